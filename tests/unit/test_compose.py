"""Composition: conf/ and overrides into a LaunchConfig; every mistake in one line."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import launcher.compose
from cluster.config import SliceType
from cluster.errors import ConfigError
from launcher.compose import compose_cluster, compose_config, compose_file, config_dir, load
from launcher.config import LaunchConfig, TrainerConfig


def test_the_defaults_are_an_emulated_v4_16_with_the_nano_model() -> None:
    config = load(compose_config(["model=gemma"]))
    assert (config.cluster.name, config.cluster.hosts, config.cluster.chips) == ("local", 2, 8)
    assert config.training.model.variant == "gemma3-nano"
    assert config.training.data.source == "python_stdlib"
    assert config.trainer.lr is None
    assert config.cluster.usd_per_hour == 0.0


def test_the_command_of_the_mission_sets_the_learning_rate() -> None:
    assert load(compose_config(["model=gemma", "trainer.lr=1e-5"])).trainer.lr == 1e-5


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


@pytest.mark.parametrize("profile", options("cluster"))
def test_every_cluster_profile_composes(profile: str) -> None:
    config = load(compose_config([f"cluster={profile}"]))
    assert config.cluster.name == profile
    assert config.training.model.variant == ("gemma3-nano" if profile == "local" else "gemma3-1b")


@pytest.mark.parametrize(("override", "expected"), [("10m", "10m"), ("auto", "auto"), ("20", 20)])
def test_checkpoints_are_made_by_steps_by_time_or_automatically(override: str, expected: int | str) -> None:
    assert load(compose_config([f"trainer.checkpoint_every={override}"])).trainer.checkpoint_every == expected


@pytest.mark.parametrize("name", options("trainer"))
def test_every_trainer_option_composes(name: str) -> None:
    load(compose_config([f"trainer={name}"]))


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_composes(name: str) -> None:
    load(compose_config([f"experiment={name}"]))


@pytest.mark.parametrize("name", ["text", "jsonl"])
def test_data_of_the_users_own_needs_a_path(name: str) -> None:
    assert load(compose_config([f"data={name}", "data.path=/x"])).training.data.path == "/x"
    with pytest.raises(ConfigError, match=r"data.path is missing"):
        load(compose_config([f"data={name}"]))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.lrr=1", "unknown setting 'trainer.lrr'; did you mean 'trainer.lr'?"),
        ("lr=1", "unknown setting 'lr'; did you mean 'trainer.lr'?"),
        ("+trainer.foo=1", "unknown setting 'trainer.foo'; known: accumulate, batch_size"),
        ("+trainer.step=1", "unknown setting 'trainer.step'; did you mean 'trainer.steps'?"),
        ("+trainr.lr=1", "unknown setting 'trainr'; did you mean 'trainer'?"),
        ("modle=gemma", "unknown setting 'modle'; did you mean 'model'?"),
        ("model=gema", "model=gema: there is no such option; did you mean 'gemma'?"),
        ("cluster=v7", "cluster=v7: there is no such option"),
        ("trainer.steps=abc", "trainer.steps: expected a whole number, got 'abc'"),
        ("trainer.steps=1.5", "trainer.steps: expected a whole number, got '1.5'"),
        ("run.resume=maybe", "run.resume: expected true or false, got 'maybe'"),
        ("trainer.lr='", 'cannot read the override "trainer.lr=\'"'),
        ("gemma", "cannot read the override 'gemma'"),
        ("run.name=${nowhere}", "nowhere"),
        ("run.name=${oc.env:NOT_THERE}", "run.name: Environment variable 'NOT_THERE' not found"),
        ("model=null", "model=null: there is no such option; known: gemma. Leave model out for the default"),
        ("trainer=5", "trainer=5: there is no such option; known: debug, default."),
        ("trainer=[1]", "trainer=1: there is no such option; known: debug, default."),
        ("trainer.steps=null", "trainer.steps: null is no value here; leave it out for the default"),
        ("trainer.mesh=3", "trainer.mesh: holds settings of its own"),
        ("trainer.samples.prompts=hello", "trainer.samples.prompts: expected a list"),
        ("run=null", "run: null is no value here"),
        ("run.root=", "run.root"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(compose_config([override]))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", "found a list"),
        ("hello", "found a text"),
        ("", "found nothing"),
        ("a: [1\n", "is not valid YAML"),
        ("trainer:\n\tsteps: 3\n", "is not valid YAML"),
        ("trainer: {steps: 3}\ndata: {}\ntrainer: {lr: 1}\n", "trainer stands there twice, in lines 1 and 3; keep one"),
        ("trainer:\n  steps: 3\n  steps: 4\n", "steps stands there twice, in lines 2 and 3; keep one"),
        ("model: null\n", "model=null: there is no such option"),
        ("trainer: [1]\n", "trainer=1: there is no such option"),
        ("trainer: fast\n", "trainer=fast: there is no such option"),
        ("trainer: {steps: three}\n", "trainer.steps: expected a whole number, got 'three'"),
        ("trainer: {steps: -3}\n", "trainer.steps -3: give a whole number of at least 1"),
        ("modle: {variant: x}\n", "unknown setting 'modle'; did you mean 'model'?"),
        ("1: 2\n", "cannot read the override '1=2'"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        compose_file(tmp_path / "run.yaml", [])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_composes_over_the_defaults_and_overrides_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    values = {
        "model": "gemma",
        "data": {"source": "text", "path": "it's, a=b"},
        "trainer": {"steps": 7, "lr": 1e-4, "mesh": {"fsdp": 2}},
        "run": {"secrets": ["A", "B"]},
    }
    path.write_text(yaml.safe_dump(values))
    config = compose_file(path, ["trainer.steps=9"])
    assert (config.trainer.steps, config.trainer.lr, config.trainer.mesh.fsdp) == (9, 1e-4, 2)
    assert config.training.data.path == "it's, a=b"
    assert config.run.secrets == ["A", "B"]


def test_what_a_run_directory_holds_composes_to_the_same_config(tmp_path: Path) -> None:
    config = load(compose_config(["trainer.lr=1e-5", "run.name=x"]))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert compose_file(path, []) == config


def test_a_cluster_composes_alone() -> None:
    assert compose_cluster(["cluster=v5e", "cluster.slices=2"]).slices == 2


def test_options_of_the_users_own_conf_are_found_behind_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf" / "trainer").mkdir(parents=True)
    (tmp_path / "conf" / "config.yaml").write_text("server: {port: 80}\n")  # of some other program
    (tmp_path / "conf" / "trainer" / "mine.yaml").write_text("defaults:\n  - default\nsteps: 3\n")
    monkeypatch.chdir(tmp_path)
    assert load(compose_config(["trainer=mine"])).trainer.steps == 3


def script_config(*overrides: str) -> LaunchConfig:
    return load(compose_config(["job=script", *overrides]))


@pytest.mark.parametrize(
    "entrypoint",
    [
        "train.py",
        "train.py --x 1",
        "train.py --lr=1e-3 --dims 1,2 --name 'two words'",
        '-m project.train --x "a b" {c: d}',
        "train.py [1] %(y)s #z",
    ],
)
def test_a_script_is_given_as_in_a_shell(entrypoint: str) -> None:
    config = script_config(f"job.entrypoint={entrypoint}")
    assert config.job.entrypoint == entrypoint
    assert not {"model", "data", "trainer"} & set(config.to_dict())


@pytest.mark.parametrize("quoted", ['"train.py --x=1"', "'train.py --x=1'"])
def test_hydras_own_quotes_are_understood_too(quoted: str) -> None:
    assert script_config(f"job.entrypoint={quoted}").job.entrypoint == "train.py --x=1"


def test_what_a_scripts_run_directory_holds_composes_to_the_same_config(tmp_path: Path) -> None:
    config = script_config("job.entrypoint=train.py --x='1 2'", "run.name=x")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert compose_file(path, []) == config
    path.write_text("job: script\nrun: {name: x}\n")
    assert compose_file(path, ["job.entrypoint=train.py --x='1 2'"]) == config


def test_settings_of_this_machine_for_trainings_do_not_keep_a_script_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "conf" / "local" / "default.yaml"
    place.parent.mkdir(parents=True)
    place.write_text("# @package _global_\ntrainer: {steps: 7}\nmodel: {variant: gemma3-nano}\nrun: {spares: false}\n")
    monkeypatch.chdir(tmp_path)
    assert load(compose_config([])).training.trainer.steps == 7
    config = script_config("job.entrypoint=train.py")
    assert (config.model, config.trainer, config.run.spares) == (None, TrainerConfig(), False)
    with pytest.raises(ConfigError, match="which trainer means nothing to"):
        script_config("job.entrypoint=train.py", "trainer.lr=1e-3")


@pytest.mark.parametrize("setting", ["model=gemma", "model.variant=gemma3-1b", "data=text", "data.path=x", "trainer=debug", "trainer.lr=1"])
def test_what_means_nothing_to_a_script_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"your own program, which {re.split('[.=]', setting)[0]} means nothing to: leave it out"):
        script_config("job.entrypoint=train.py", setting)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["job=script"], "job.entrypoint is missing"),
        (["job=script", "job.entrypoint=run.sh"], "run.sh is no Python program"),
        (["job.entrypoint=train.py"], "job.entrypoint 'train.py' needs job=script"),
        (["job=scrpt"], "job=scrpt: there is no such option; did you mean 'script'?"),
        (["job.kind=scrpt"], "job.kind 'scrpt' is unknown; did you mean 'script'?"),
    ],
)
def test_a_wrong_job_is_refused_in_one_line(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(compose_config(overrides))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_types_of_slices_and_labels_can_be_given_in_a_profile_a_file_and_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {"name": "mine", "cloud": "emulated", "accelerator_type": "v4-8", "default_variant": "gemma3-nano"}
    values |= {"labels": {"team": "x"}, "node_types": {"pod": {"accelerator_type": "v4-16", "provisioning": "spot"}}}
    shutil.copytree(config_dir(), tmp_path / "conf")
    (tmp_path / "conf" / "cluster" / "mine.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"cluster": values}))
    own = ["cluster.accelerator_type=v4-8", "cluster.labels.team=x", "cluster.name=mine"]
    type_at_once = "cluster.node_types={pod: {accelerator_type: v4-16, provisioning: spot}}"
    type_by_field = ["cluster.node_types.pod.accelerator_type=v4-16", "cluster.node_types.pod.provisioning=spot"]
    made = [
        load(compose_config([*own, type_at_once])),
        load(compose_config([*own, *type_by_field])),
        compose_file(tmp_path / "mine.yaml", []),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(launcher.compose, "config_dir", lambda: tmp_path / "conf")
        made.append(load(compose_config(["cluster=mine"])))
    for config in made:
        assert config.cluster.labels == {"team": "x"}
        assert config.cluster.node_types == {"pod": SliceType(accelerator_type="v4-16", provisioning="spot")}


def test_wrong_field_of_a_type_of_slices_is_told() -> None:
    with pytest.raises(ConfigError, match=r"node_types.pod.acelerator_type'; did you mean 'cluster.node_types.pod.accelerator_type'"):
        load(compose_config(["cluster.node_types.pod.acelerator_type=v4-16"]))
