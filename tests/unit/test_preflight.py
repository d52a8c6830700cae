"""What is refused before anything is started or changed."""

import dataclasses
import importlib.util
import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError
from launcher import preflight
from launcher.config import LaunchConfig
from launcher.data.tokenizer import ByteTokenizer
from launcher.models.registry import FAMILIES, VARIANTS
from launcher.plan import describe
from launcher.preflight import prepare_run
from launcher.runs import RunDirectory, RunState, RunStatus


def config_for(root: Path, **groups: dict[str, Any]) -> LaunchConfig:
    values: dict[str, Any] = {
        "cluster": {"name": "c", "cloud": "emulated", "accelerator_type": "v4-16"},
        "model": {"variant": "gemma3-nano"},
        "data": {"source": "python_stdlib"},
        **groups,
    }
    values["run"] = {"root": str(root), **values.get("run", {})}
    return LaunchConfig.from_dict(values).with_absolute_paths()


def existing(root: Path, state: RunState, step: int = 5) -> RunDirectory:
    run = RunDirectory(root / "old")
    run.create(config_for(root))
    run.write_status(RunStatus("old", "c", state, step=step, total_steps=5))
    return run


def test_a_run_without_a_name_gets_one_that_says_what_and_when(tmp_path: Path) -> None:
    run, code = prepare_run(config_for(tmp_path))
    assert run.run_id.startswith("gemma3-nano-")
    assert not run.path.exists(), "nothing is written yet"
    assert code.startswith(b"PK")


@pytest.mark.parametrize("state", [RunState.SUCCEEDED, RunState.FAILED, RunState.STOPPED])
def test_a_finished_name_is_taken_unless_it_is_resumed(tmp_path: Path, state: RunState) -> None:
    existing(tmp_path, state)
    with pytest.raises(ConfigError, match=r"exists .* run.resume=true"):
        prepare_run(config_for(tmp_path, run={"name": "old"}))
    run, _ = prepare_run(config_for(tmp_path, run={"name": "old", "resume": True}, trainer={"steps": 9}))
    assert run.run_id == "old"


@pytest.mark.parametrize("state", [RunState.QUEUED, RunState.STARTING, RunState.RUNNING, RunState.RECOVERING])
def test_an_unfinished_run_is_neither_started_twice_nor_resumed(tmp_path: Path, state: RunState) -> None:
    existing(tmp_path, state)
    for resume in (False, True):
        with pytest.raises(ConfigError, match="already; follow it with"):
            prepare_run(config_for(tmp_path, run={"name": "old", "resume": resume}))


@pytest.mark.parametrize(
    ("groups", "told", "allow"),
    [
        ({"model": {"variant": "gemma3-270m"}}, "model.variant from gemma3-nano to gemma3-270m", "model"),
        ({"trainer": {"seed": 7}}, "trainer.seed from 0 to 7", "seed"),
        ({"data": {"source": "python_stdlib", "max_bytes": 90_000}}, "data.max_bytes from None to 90000", "data"),
    ],
)
def test_a_resume_with_other_settings_is_refused_unless_it_is_allowed(
    tmp_path: Path, groups: dict[str, dict[str, Any]], told: str, allow: str
) -> None:
    existing(tmp_path, RunState.STOPPED)
    with pytest.raises(ConfigError, match=f"the run was made with other settings: {told};.*run.allow=.{allow}.$"):
        prepare_run(config_for(tmp_path, run={"name": "old", "resume": True}, **groups))
    prepare_run(config_for(tmp_path, run={"name": "old", "resume": True, "allow": [allow]}, **groups))


def test_a_finished_run_is_resumed_only_to_train_further(tmp_path: Path) -> None:
    existing(tmp_path, RunState.SUCCEEDED, step=5)
    with pytest.raises(ConfigError, match="finished at step 5"):
        prepare_run(config_for(tmp_path, run={"name": "old", "resume": True}, trainer={"steps": 5}))


def test_a_run_that_has_used_up_its_hours_is_resumed_only_with_more(tmp_path: Path) -> None:
    run = existing(tmp_path, RunState.STOPPED)
    run.write_status(RunStatus("old", "c", RunState.STOPPED, phases={"training": 7200.0, "idle": 1e6}))
    with pytest.raises(ConfigError, match=r"run\.max_hours=2 is reached by what the run has used already"):
        prepare_run(config_for(tmp_path, run={"name": "old", "resume": True, "max_hours": 2}))
    prepare_run(config_for(tmp_path, run={"name": "old", "resume": True, "max_hours": 2.1}))


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"root": "/proc/runs"}, "cannot write into /proc"),
        ({"root": "s3://bucket/runs"}, "give a local path, or gs://"),
        ({"root": "gs:///runs"}, "is not gs://<bucket>/<name>"),
        ({"name": "new", "resume": True}, "there is no run 'new'"),
        ({"code": "nowhere"}, "no such folder"),
    ],
)
def test_a_place_that_cannot_be_used_is_refused(tmp_path: Path, run: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        prepare_run(config_for(tmp_path, run=run))


def test_relative_paths_are_made_absolute_before_the_run_leaves_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_for(Path("runs"), data={"source": "text", "path": "book.txt"})
    assert (config.training.data.path, config.run.root) == (str(tmp_path / "book.txt"), str(tmp_path / "runs"))


def test_the_place_of_runs_follows_from_the_cluster(tmp_path: Path) -> None:
    emulated = config_for(tmp_path)
    emulated = dataclasses.replace(emulated, run=dataclasses.replace(emulated.run, root=None))
    assert emulated.with_environment({}).run.root == "runs"
    google = dataclasses.replace(emulated, cluster=dataclasses.replace(emulated.cluster, cloud="google"))
    assert google.with_environment({"PODLAUNCH_BUCKET": "our-runs"}).run.root == "gs://our-runs/runs"
    with pytest.raises(ConfigError, match="set PODLAUNCH_BUCKET"):
        google.with_environment({})


def test_the_plan_names_model_alternatives_place_and_price(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    run, _ = prepare_run(config)
    plan = dict(describe(config, run))
    assert plan["model"].startswith("gemma3-nano, 3.46 M parameters; choose another with model.variant=gemma3-270m")
    assert "2 hosts, 8 chips" in plan["cluster"]
    assert plan["price"] == "$25.76 an hour"
    assert plan["directory"] == str(run.path)


def script_config(root: Path, code: Path, entrypoint: str, **run: Any) -> LaunchConfig:
    values = {
        "cluster": {"name": "c", "cloud": "emulated", "accelerator_type": "v4-16"},
        "job": {"kind": "script", "entrypoint": entrypoint},
        "run": {"root": str(root), "code": str(code), **run},
    }
    return LaunchConfig.from_dict(values).with_absolute_paths()


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    for name in ("My_Train.v2.py", "project/train.py", "outputs/old.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_script_names_its_run_and_is_sent(tmp_path: Path, code: Path) -> None:
    config = script_config(tmp_path / "runs", code, "My_Train.v2.py --x 1")
    run, sent = prepare_run(config)
    assert run.run_id.startswith("my-train-v2-")
    assert zipfile.ZipFile(io.BytesIO(sent)).namelist()[-2:] == ["user/My_Train.v2.py", "user/project/train.py"]
    plan = dict(describe(config, run))
    assert plan["script"] == "My_Train.v2.py --x 1, once a host"
    assert plan["code"] == str(code)
    assert "model" not in plan


@pytest.mark.parametrize("entrypoint", ["project/train.py", "-m project.train", "-m json.tool"])
def test_a_program_of_the_code_or_an_installed_one_is_accepted(tmp_path: Path, code: Path, entrypoint: str) -> None:
    prepare_run(script_config(tmp_path / "runs", code, entrypoint))


@pytest.mark.parametrize(
    ("entrypoint", "expected"),
    [
        ("train.py", "there is no train.py in"),
        ("outputs/old.py", "in a folder that is not sent to the hosts"),
        ("-m project.missing", "there is no module project.missing to run in"),
        ("-m nowhere_at_all.train", "and none is installed"),
    ],
)
def test_a_program_that_the_hosts_would_not_have_is_refused(tmp_path: Path, code: Path, entrypoint: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        prepare_run(script_config(tmp_path / "runs", code, entrypoint))


def test_without_a_folder_of_code_that_of_the_command_is_sent(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(code)
    config = script_config(code / "runs", code, "project/train.py")
    assert dataclasses.replace(config, run=dataclasses.replace(config.run, code=None)).with_absolute_paths().run.code == str(code)


def test_a_script_is_resumed_with_whatever_arguments_but_not_as_another_job(tmp_path: Path, code: Path) -> None:
    run = RunDirectory(tmp_path / "old")
    run.create(script_config(tmp_path, code, "project/train.py --steps 5"))
    run.write_status(RunStatus("old", "c", RunState.SUCCEEDED, step=5, total_steps=5))
    prepare_run(script_config(tmp_path, code, "project/train.py --steps 9", name="old", resume=True))
    with pytest.raises(ConfigError, match=r"made with job=script; choose another run\.name for job=train"):
        prepare_run(config_for(tmp_path, run={"name": "old", "resume": True}))


REFERENCE = Path(__file__).resolve().parents[1] / "references" / "gemma" / "gemma3"


def test_weights_that_do_not_fit_or_that_hosts_do_not_see_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"model": {"variant": "gemma3-nano", "weights": str(REFERENCE)}}
    with pytest.raises(ConfigError, match=r"its config.json says layers 7 where gemma3-nano has 6; d_model 32 where"):
        prepare_run(config_for(tmp_path, **weights))
    with pytest.raises(ConfigError, match=r"model.weights .*/nowhere: there is no config.json; give a folder with"):
        prepare_run(config_for(tmp_path, model={"variant": "gemma3-nano", "weights": "nowhere"}))
    shape = FAMILIES["gemma"].hf_shape(json.loads((REFERENCE / "config.json").read_text()))
    monkeypatch.setitem(VARIANTS, "gemma3-nano", dataclasses.replace(VARIANTS["gemma3-nano"], **shape))
    with pytest.raises(ConfigError, match=r"the folder holds neither tokenizer.json nor tokenizer.model"):
        prepare_run(config_for(tmp_path, **weights))
    complete = shutil.copytree(REFERENCE, tmp_path / "complete")
    ByteTokenizer().save(complete)
    fits = config_for(tmp_path, model={"variant": "gemma3-nano", "weights": str(complete)})
    with pytest.raises(ConfigError, match=r"complete has \d+ tokens and gemma3-nano only 64"):
        prepare_run(fits)
    elsewhere = dataclasses.replace(fits, cluster=dataclasses.replace(fits.cluster, cloud="google"))
    with pytest.raises(ConfigError, match=r"the hosts of cluster 'c' do not see this machine's files; copy the folder to Cloud Storage"):
        preflight._check_weights(elsewhere, None)


def test_weights_and_biases_needs_its_key_by_name_unless_it_is_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    online: dict[str, Any] = {"trainer": {"wandb": {"project": "p"}}, "run": {"secrets": ["WANDB_API_KEY"]}}
    with pytest.raises(ConfigError, match=r"WANDB_API_KEY is not among run.secrets or not set; .*mode=offline"):
        prepare_run(config_for(tmp_path, **online))
    monkeypatch.setenv("WANDB_API_KEY", "k")
    prepare_run(config_for(tmp_path, **online))
    with pytest.raises(ConfigError, match=r"is not among run\.secrets"):
        prepare_run(config_for(tmp_path, trainer={"wandb": {"project": "p"}}))
    prepare_run(config_for(tmp_path, trainer={"wandb": {"project": "p", "mode": "offline"}}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'podlaunch\[wandb\]'"):
        prepare_run(config_for(tmp_path, **online))
