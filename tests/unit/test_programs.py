"""What `tpu train check` has compiled: kept on its machine, sent with a run, fetched by its hosts."""

import dataclasses
import os
from pathlib import Path

import pytest

from cluster.errors import PodlaunchError
from launcher import code, programs
from launcher.compose import compose_config, load
from launcher.config import LaunchConfig
from launcher.gang.runner import Runner
from launcher.run_files import LocalFiles, RunFiles, open_files
from launcher.runs import RunDirectory

ENTRY = "jit_train-0123-cache"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PODLAUNCH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["local", "gs"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> RunFiles:
    if request.param == "local":
        return LocalFiles(tmp_path / "run")
    return open_files(f"gs://runs-bucket/{tmp_path.name}/run", request.getfixturevalue("endpoint"))


def config(*overrides: str) -> LaunchConfig:
    return load(compose_config(["cluster=v6e", "experiment=bf16", *overrides]))


def compile_into(given: LaunchConfig, content: bytes) -> None:
    with programs.room_for(given) as folder:
        (folder / ENTRY).write_bytes(content)
        (folder / "jit_train-0123-atime").write_bytes(b"JAX's own")
        (folder / "jit_stage-4567-cache").write_bytes(b"for a processor")


def break_down(given: LaunchConfig) -> None:
    with programs.room_for(given) as folder:
        (folder / ENTRY).write_bytes(b"half")
        raise PodlaunchError("the compiler broke down")


def test_a_key_stands_for_the_step_and_the_slices_and_nothing_else() -> None:
    same = {programs.key_of(config()), programs.key_of(config("run.name=other", "run.max_hours=3"))}
    changes = (["trainer.lr=1"], ["trainer.remat=none"], ["cluster.accelerator_type=v6e-16"], ["cluster.slices=2", "cluster.max_slices=2"])
    others = {programs.key_of(config(*given)) for given in changes}
    assert len(same) == 1
    assert len(same | others) == 5


def test_what_was_compiled_comes_to_the_hosts_of_a_run_that_would_compile_the_same(files: RunFiles, cache: Path) -> None:
    compile_into(config(), b"program")
    programs.send(config("trainer.lr=1"), files)
    assert files.list(programs.FOLDER) == []
    programs.send(config("run.name=other"), files)
    assert files.list(programs.FOLDER) == [ENTRY]
    programs.fetch(files, cache / "compilation")
    assert (cache / "compilation" / ENTRY).read_bytes() == b"program"


def test_what_a_host_has_already_is_not_fetched(files: RunFiles, cache: Path) -> None:
    (cache / "compilation").mkdir(parents=True)
    (cache / "compilation" / ENTRY).write_bytes(b"its own")
    compile_into(config(), b"program")
    programs.send(config(), files)
    programs.fetch(files, cache / "compilation")
    assert (cache / "compilation" / ENTRY).read_bytes() == b"its own"


def test_where_nothing_was_compiled_nothing_is_sent_or_fetched(files: RunFiles, cache: Path) -> None:
    programs.send(config(), files)
    programs.fetch(files, cache / "compilation")
    assert not cache.exists()


def test_the_newest_program_of_a_step_is_kept_and_a_failed_check_leaves_it(cache: Path, tmp_path: Path) -> None:
    files = LocalFiles(tmp_path / "run")
    compile_into(config(), b"old")
    compile_into(config(), b"new")
    with pytest.raises(PodlaunchError):
        break_down(config())
    with programs.room_for(config()):
        pass  # it was compiled, and JAX kept nothing
    programs.send(config(), files)
    assert files.read(f"{programs.FOLDER}/{ENTRY}") == b"new"
    assert len(list((cache / programs.FOLDER).iterdir())) == 1, "no folder of a check is left"


def test_a_check_whose_program_cannot_be_kept_ends_well(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with programs.room_for(config()) as folder:
        (folder / ENTRY).symlink_to(folder / "nothing")  # what cannot be copied, as on a full disk
        (folder / "no folder to go to").symlink_to(folder / "nothing")
    assert "the compiled program is not kept" in caplog.text


def test_only_the_newest_steps_are_kept(cache: Path, tmp_path: Path) -> None:
    given = [config(f"trainer.steps={100 + number}") for number in range(programs.KEPT + 1)]
    for age, one in enumerate(given):
        compile_into(one, b"program")
        os.utime(cache / programs.FOLDER / programs.key_of(one), (1000 + age, 1000 + age))
    compile_into(given[-1], b"program")
    kept = {path.name for path in (cache / programs.FOLDER).iterdir()}
    assert kept == {programs.key_of(one) for one in given[1:]}


def test_a_host_fetches_before_its_training_process_starts(cache: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "a-run")
    run.create(dataclasses.replace(config(), run=dataclasses.replace(config().run, root=str(tmp_path), spares=False)))
    run.write_code(code.pack(None))
    run.files.write(f"{programs.FOLDER}/{ENTRY}", b"program")
    runner = Runner(str(run.path), 0)
    runner._fetch(0)
    compiled = Path(runner._static["PODLAUNCH_COMPILATION_CACHE"])
    assert (compiled / ENTRY).read_bytes() == b"program"


def test_a_host_that_cannot_keep_it_trains_all_the_same(cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunDirectory(tmp_path / "a-run")
    run.create(config())
    run.write_code(code.pack(None))
    run.files.write(f"{programs.FOLDER}/{ENTRY}", b"program")
    cache.mkdir()
    (cache / "compilation").write_text("a file where the folder should be")
    runner = Runner(str(run.path), 0)
    runner._fetch(0)
    assert runner._static["PODLAUNCH_RUN_DIR"] == str(run.path)
    assert "what was compiled for the run before is not used" in caplog.text
