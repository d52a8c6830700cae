"""From a command line with `-m` to the points of a sweep: Hydra's own composition, and what is refused before anything is started."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from launcher import app
from launcher.compose import config_dir, register_schema, sweep_name
from launcher.config import RUN_NAME
from launcher.guard import guarded
from launcher.sweep_points import Point, compose_points


@pytest.fixture(autouse=True)
def a_folder_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # so that it is as before when the test is over
    yield
    GlobalHydra.instance().clear()


def points(*batch: list[str], task: list[str]) -> list[Point]:
    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        return compose_points(loader, loader.load_configuration("config", task, RunMode.MULTIRUN), batch)


def test_a_point_is_named_by_what_differs_and_by_a_hash_of_all_its_settings() -> None:
    task = ["trainer=debug", "trainer.lr=1e-5,3e-5", "model.variant=gemma3-nano,gemma3-270m"]
    one, other = points(
        ["trainer=debug", "trainer.lr=1e-5", "model.variant=gemma3-nano"],
        ["trainer=debug", "trainer.lr=3e-5", "model.variant=gemma3-270m"],
        task=task,
    )
    assert one.overrides == ("trainer.lr=1e-5", "model.variant=gemma3-nano"), "not what is the same for all"
    assert (one.number, other.number) == (1, 2)
    assert re.fullmatch(r"gemma3-nano-lr-1e-5-variant-gemma3-nano-[0-9a-f]{8}", one.run_id)
    assert re.fullmatch(r"gemma3-270m-lr-3e-5-variant-gemma3-270m-[0-9a-f]{8}", other.run_id)
    assert (other.config.trainer.lr, other.config.trainer.steps, other.config.training.model.variant) == (3e-5, 10, "gemma3-270m")


def name_of(*overrides: str, task: str = "trainer.lr=1,2") -> str:
    (point,) = points(list(overrides), task=[task])
    return point.run_id


def test_the_name_is_the_same_as_long_as_the_settings_are() -> None:
    name = name_of("trainer.lr=1")
    assert name == name_of("trainer.lr=1"), "whenever"
    assert name == name_of("trainer.lr=1", "run.root=/somewhere/else", task="run.root=/somewhere/else"), "wherever it lies"
    assert name.removesuffix(name[-8:]) == name_of("trainer.lr=1", "trainer.seed=1", task="trainer.seed=1").removesuffix(
        name_of("trainer.lr=1", "trainer.seed=1", task="trainer.seed=1")[-8:]
    )
    assert name[-8:] != name_of("trainer.lr=1", "trainer.seed=1", task="trainer.seed=1")[-8:]


@pytest.mark.parametrize("entrypoint", ["train.py --lr=1e-3 --name 'Two Words' " + "x" * 80, "-m project.train", "train.py --lr=-.5"])
def test_a_name_is_one_that_a_run_may_have(entrypoint: str) -> None:
    quoted = entrypoint.replace("'", "\\'")
    task = ["job=script", "run.name=mine", "job.entrypoint='a.py','b.py'"]
    (point,) = points(["job=script", "run.name=mine", f"job.entrypoint='{quoted}'"], task=task)
    assert RUN_NAME.fullmatch(point.run_id)
    assert point.run_id.startswith("mine-entrypoint-")
    assert point.config.job.entrypoint == entrypoint


def test_the_folder_of_a_sweep_depends_on_its_settings_and_not_on_their_order() -> None:
    assert sweep_name(None, ["a=1,2", "b=3"]) == sweep_name(None, ["b=3", "a=1,2"])
    assert sweep_name(None, ["a=1,2"]) != sweep_name(None, ["a=1,3"])
    assert re.fullmatch(r"mine-[0-9a-f]{8}", sweep_name("mine", ["a=1,2"]))


Launch = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Launch:
    """launch.py with these arguments; its exit code and what it says on stderr."""

    def run(*arguments: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["launch.py", *arguments])
        code = guarded(lambda: app._run_command_line(arguments), "launch")
        return code, capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trainer.steps=10,ten"], r"point 2 of the sweep \(trainer.steps=ten\): trainer.steps: expected a whole number, got 'ten'"),
        (["model.variant=gemma3-nano,gemma3-nanno"], r"point 2 of the sweep \(model.variant=gemma3-nanno\): .*did you mean 'gemma3-nano'"),
        (["cluster=local,v7"], r"point 2 of the sweep \(cluster=v7\): cluster=v7: there is no such option"),
        (["+trainer.learning=1,2"], r"point 1 of the sweep \(\+trainer.learning=1\): unknown setting 'trainer.learning'"),
        (["trainer.lrr=1,2"], r"point 1 of the sweep \(trainer.lrr=1\): unknown setting 'trainer.lrr'; did you mean 'trainer.lr'\?"),
        (["trainer.lrr=1", "trainer.seed=1,2"], r"unknown setting 'trainer.lrr'; did you mean 'trainer.lr'\?"),
        (["trainer.batch_size=8,9"], r"point 2 of the sweep \(trainer.batch_size=9\): trainer.batch_size 9 is not divisible"),
        (["data=text", "data.path=/nowhere/a,/nowhere/b"], r"point 1 of the sweep \(data.path=/nowhere/a\): .*/nowhere/a"),
        (["trainer.lr=1,2", "hydra.launcher.max_concurrent=0"], r"hydra.launcher.max_concurrent 0: give a whole number of at least 1"),
        (["trainer.lr=1,2", "hydra.launcher.max_concurrent=two"], r"hydra.launcher.max_concurrent: expected a whole number, got 'two'"),
        (["trainer.lr=interval(1,2)"], r"does not support sweep type"),
    ],
)
def test_a_wrong_point_is_refused_in_one_line_before_anything_is_started(launch: Launch, overrides: list[str], expected: str) -> None:
    code, said = launch("-m", *overrides)
    assert code == 2, said
    (line,) = said
    assert re.match(f"error: .*{expected}", line), line
    assert not Path("runs").exists()
    assert not list((Path("state") / "clusters").glob("*/")), "no cluster was brought up"


def test_hydras_other_flags_give_one_line_and_the_runs_exit_code_too(launch: Launch) -> None:
    code, said = launch("--config-name=config", "trainer.lrr=1")
    assert (code, said) == (2, ["error: unknown setting 'trainer.lrr'; did you mean 'trainer.lr'?"])
