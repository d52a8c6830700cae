"""A spare waits, takes its orders and is the training process then. Real processes, no JAX, no Ray."""

import dataclasses
import os
import queue
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.errors import PodlaunchError
from cluster.secret_place import SecretPlace
from launcher import code
from launcher.config import RunConfig
from launcher.gang import runner as runner_module
from launcher.gang.child import Child, Event
from launcher.gang.runner import Runner
from launcher.runs import RunDirectory
from launcher.training.spare import libraries_of
from tests.script_run import make_script_run

_AS_MODULE = "import runpy; runpy.run_module('launcher.training.child', run_name='__main__', alter_sys=True)"
WAITS = """
import os, signal, sys, time
from launcher.training import script
print(os.environ["PODLAUNCH_ATTEMPT"], os.environ["OWN"], os.getpid(), flush=True)
script.preempted()
script.report(1)
while not script.preempted():
    time.sleep(0.01)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return make_script_run(tmp_path, WAITS)


@pytest.fixture
def runner(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    monkeypatch.setenv("PODLAUNCH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("PODLAUNCH_HOST_DIR", raising=False)
    monkeypatch.setattr(runner_module, "SPARE_AFTER_S", 0.0)
    made = Runner(str(run.path), 0)
    yield made
    made.kill()
    if made._spare is not None:
        made._spare.signal(signal.SIGKILL)
        assert made._spare.wait(20)


def start(runner: Runner, attempt: int) -> None:
    _heard.clear()
    runner.start(attempt, {"OWN": f"own-{attempt}", "PODLAUNCH_PROCESS_ID": "0"}, f"logs/{attempt}/host-0.log", None)


_heard: list[Event] = []
"""What the runner said of this attempt and nobody has asked for yet: events come several at a time."""


def follow(runner: Runner, until: Callable[[Event], bool]) -> Event:
    for _ in range(100):
        while _heard:
            if until(event := _heard.pop(0)):
                return event
        _heard.extend(runner.next_events(1.0))
    raise AssertionError("it never came")


def stepped(runner: Runner) -> None:
    follow(runner, lambda event: event["event"] == "step")


def ended(runner: Runner) -> int:
    return int(follow(runner, lambda event: event["event"] == "exit")["code"])


def said(run: RunDirectory, attempt: int) -> list[str]:
    return (run.path / "logs" / str(attempt) / "host-0.log").read_text().split()


def pid_of(child: Child | None) -> int:
    assert child is not None
    assert child._process is not None
    return child._process.pid


def test_a_restart_takes_the_spare_with_the_new_attempts_environment_log_and_events(runner: Runner, run: RunDirectory) -> None:
    start(runner, 0)
    stepped(runner)
    spare = pid_of(runner._spare)
    assert said(run, 0) == ["0", "own-0", str(pid_of(runner._child))]
    runner.kill()
    start(runner, 1)
    assert pid_of(runner._child) == spare
    stepped(runner)
    assert said(run, 1) == ["1", "own-1", str(spare)]
    assert pid_of(runner._spare) != spare, "a new one waits"
    runner.terminate()
    assert ended(runner) == 128 + signal.SIGTERM


def test_a_spare_that_died_is_no_failure_of_the_run(runner: Runner, run: RunDirectory) -> None:
    start(runner, 0)
    stepped(runner)
    spare = pid_of(runner._spare)
    os.kill(spare, signal.SIGKILL)
    assert runner._spare is not None
    assert runner._spare.wait(20)
    assert runner.next_events(0.2) == []
    runner.kill()
    start(runner, 1)
    assert pid_of(runner._child) != spare
    stepped(runner)
    assert said(run, 1)[:2] == ["1", "own-1"]


def test_the_first_process_begins_before_its_orders(run: RunDirectory, runner: Runner) -> None:
    ahead = Runner(str(run.path), 0, first=3)
    first = pid_of(ahead._spare)
    start(ahead, 3)
    assert pid_of(ahead._child) == first
    stepped(ahead)
    assert said(run, 3) == ["3", "own-3", str(first)]
    ahead.kill()


def test_secrets_that_the_run_names_reach_its_process(runner: Runner, run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "secrets.json").write_text('{"OWN": "secret"}')
    place = SecretPlace(file=str(tmp_path / "secrets.json"))
    pid = runner.start(0, {"PODLAUNCH_PROCESS_ID": "0"}, "logs/0/host-0.log", place.to_json())
    stepped(runner)
    assert said(run, 0) == ["0", "secret", str(pid)]


def test_what_cannot_be_fetched_ahead_is_an_error_of_the_start(tmp_path: Path, runner: Runner) -> None:
    ahead = Runner(str(tmp_path / "nowhere"), 0, first=0)
    assert ahead._spare is None
    with pytest.raises(PodlaunchError, match=r"has no code\.zip"):
        start(ahead, 0)


def test_an_import_that_fails_ahead_is_left_to_the_program(run: RunDirectory, runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "code" / "main.py").write_text("import numpy\n")
    run.write_code(code.pack(tmp_path / "code"))
    broken = tmp_path / "broken"
    (broken / "numpy").mkdir(parents=True)
    (broken / "numpy" / "__init__.py").write_text("raise RuntimeError('a broken installation')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner_module, "_CHILD", (sys.executable, "-c", f"import sys; sys.path.insert(0, {str(broken)!r}); {_AS_MODULE}"))
        ahead = Runner(str(run.path), 0, first=0)
        start(ahead, 0)
        assert ended(ahead) == 1
    assert "a broken installation" in (run.path / "logs" / "0" / "host-0.log").read_text()


def test_a_spare_dies_with_its_runner(runner: Runner) -> None:
    start(runner, 0)
    stepped(runner)
    assert psutil.Process(pid_of(runner._spare)).ppid() == os.getpid()
    assert runner._spare is not None
    assert runner._spare._orders is not None
    pipe, runner._spare._orders = runner._spare._orders, None
    os.close(pipe)  # as the kernel does then
    assert runner._spare.wait(20)
    runner._spare = None


def test_without_spares_there_is_none(runner: Runner, run: RunDirectory) -> None:
    run.create(dataclasses.replace(run.config(), run=RunConfig(name="a", spares=False)))
    start(runner, 0)
    stepped(runner)
    runner.next_events(0.1)
    assert runner._spare is None


def test_a_program_that_fails_at_once_in_a_spare_is_told_as_always(runner: Runner, run: RunDirectory, tmp_path: Path) -> None:
    start(runner, 0)
    stepped(runner)
    runner.kill()
    (code.unpack(run.read_code(), tmp_path / "cache" / "code") / "user" / "main.py").write_text("raise ValueError('bad')")
    start(runner, 1)
    assert follow(runner, lambda event: event["event"] == "error")["error"] == "ValueError: bad"
    assert ended(runner) == 1


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import jax.numpy as jnp\nfrom flax import nnx\n", ["jax", "flax.nnx"]),
        ("import numpy\n", ["numpy"]),
        ("import os\nos.environ['JAX_ENABLE_X64'] = '1'\nimport jax\n", []),
        ("print('jax')\n", []),
    ],
)
def test_a_spare_imports_what_the_program_names_unless_it_touches_the_environment(tmp_path: Path, source: str, expected: list[str]) -> None:
    (tmp_path / "main.py").write_text(source)
    assert libraries_of(tmp_path) == expected


def test_the_pipe_carries_the_orders_of_a_large_environment(tmp_path: Path) -> None:
    """More than a pipe holds: writing waits for the reader."""
    (tmp_path / "config.yaml").write_text("job: {kind: script, entrypoint: main.py}\n")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "main.py").write_text("import os; print(len(os.environ['LARGE']))")
    env = {**os.environ, "PODLAUNCH_USER_CODE": str(tmp_path / "code")}
    spare = Child([sys.executable, "-m", "launcher.training.child", str(tmp_path)], env, None, queue.Queue())
    assert spare.order([str(tmp_path)], {"LARGE": "x" * 100_000}, tmp_path / "log", queue.Queue())
    assert spare.wait(60)
    assert (tmp_path / "log").read_text() == "100000\n"
