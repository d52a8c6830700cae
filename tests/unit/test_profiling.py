"""A profile's way: from the run directory over the supervisor to a training process, which traces whole steps; JAX's tracer is replaced."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import PodlaunchError
from launcher.cli.train_profile import wait_for_traces
from launcher.gang.profiling import Profiling
from launcher.profiles import ProfileRequest, trace_name
from launcher.runs import RunDirectory, RunState, RunStatus
from launcher.training.profiling import Profiler

ONE = ProfileRequest("2026_01_02_03_04_05", 2)


class Tracer:
    """Leaves a file as JAX does, in a folder of the time and under the machine's name."""

    def __init__(self, error: Exception | None = None, files: int = 1) -> None:
        self.error, self.files = error, files
        self.calls: list[str] = []
        self._folder = Path()

    def start(self, folder: str) -> None:
        self.calls.append("start")
        self._folder = Path(folder)
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        self.calls.append("stop")
        place = self._folder / "plugins" / "profile" / "2026_07_08"
        place.mkdir(parents=True)
        for number in range(self.files):
            (place / f"machine{number}.xplane.pb").write_bytes(b"trace")


class Heard:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def emit(self, event: str, **values: Any) -> None:
        self.events.append({"event": event, **values})


class Steps:
    """A loop that says when it waited for its devices."""

    def __init__(self, output: Path, tracer: Tracer, fd: int | None) -> None:
        self.heard, self.tracer = Heard(), tracer
        self.profiler = Profiler(fd, output, 1, self.heard, start=tracer.start, stop=tracer.stop)

    def do(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.profiler.before(step, lambda: self.tracer.calls.append("wait"))
            self.tracer.calls.append(f"step {step}")


@pytest.fixture
def pipe() -> Iterator[tuple[int, Callable[[ProfileRequest], object]]]:
    reading, writing = os.pipe()
    yield reading, lambda request: os.write(writing, f"{request.to_json()}\n".encode())
    os.close(reading)
    os.close(writing)


Pipe = tuple[int, Callable[[ProfileRequest], object]]


def test_whole_steps_are_traced_and_the_trace_appears_where_xprof_looks(tmp_path: Path, pipe: Pipe) -> None:
    steps = Steps(tmp_path, Tracer(), pipe[0])
    steps.do(1, 2)
    pipe[1](ONE)
    steps.do(3, 6)
    assert steps.tracer.calls == ["step 1", "step 2", "wait", "start", "step 3", "step 4", "wait", "stop", "step 5", "step 6"]
    assert (tmp_path / trace_name(ONE.id, 1)).read_bytes() == b"trace"
    assert steps.heard.events == [{"event": "profile", "id": ONE.id, "first": 3, "last": 4, "bytes": 5}]
    assert [path.name for path in tmp_path.iterdir()] == ["profiles"], "nothing is left of what JAX wrote"


def test_a_trace_that_the_end_of_training_cuts_short_is_kept(tmp_path: Path, pipe: Pipe) -> None:
    steps = Steps(tmp_path, Tracer(), pipe[0])
    pipe[1](ONE)
    steps.do(1, 1)
    steps.profiler.finish()
    steps.profiler.finish()
    assert steps.heard.events == [{"event": "profile", "id": ONE.id, "first": 1, "last": 1, "bytes": 5}]


@pytest.mark.parametrize(
    ("tracer", "words"),
    [(Tracer(RuntimeError("Profile has already been started.")), "already been started"), (Tracer(files=2), "too many values")],
)
def test_what_goes_wrong_is_told_and_training_goes_on(tmp_path: Path, pipe: Pipe, tracer: Tracer, words: str) -> None:
    steps = Steps(tmp_path, tracer, pipe[0])
    pipe[1](ONE)
    steps.do(1, 4)
    assert steps.tracer.calls[-1] == "step 4"
    (told,) = steps.heard.events
    assert (told["event"], told["id"]) == ("profile_failed", ONE.id)
    assert words in told["error"]
    assert list(tmp_path.iterdir()) == []


def test_without_a_runner_nothing_is_ever_traced(tmp_path: Path) -> None:
    steps = Steps(tmp_path, Tracer(), None)
    steps.do(1, 3)
    assert steps.tracer.calls == ["step 1", "step 2", "step 3"]


def test_a_request_is_passed_on_once_an_attempt_and_done_when_every_host_has_answered() -> None:
    profiling = Profiling(2)
    assert profiling.to_send(None) is None
    assert profiling.to_send(ONE) == ONE
    assert profiling.to_send(ONE) is None
    answer = {"event": "profile", "id": ONE.id}
    assert not profiling.done(1, {**answer, "id": "another"})
    assert not profiling.done(1, answer)
    assert not profiling.done(1, answer), "the same host once more"
    assert profiling.done(0, {**answer, "event": "profile_failed"})
    assert Profiling(2).to_send(ONE) == ONE, "the next attempt is told again"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "r")
    made.path.mkdir()
    made.write_status(RunStatus("r", "c", RunState.RUNNING, hosts=2))
    return made


def trace(run: RunDirectory, host: int) -> None:
    path = run.path / trace_name(ONE.id, host)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_the_command_waits_for_every_hosts_trace(run: RunDirectory) -> None:
    assert run.request_profile(ONE)
    assert run.profile_requested() == ONE
    assert not run.request_profile(ProfileRequest("later", 1)), "one at a time"
    to_do = [lambda: trace(run, 0), lambda: trace(run, 1)]
    wait_for_traces(run, ONE, lambda _: to_do.pop(0)())
    assert to_do == []


def test_the_command_tells_what_a_host_could_not_do(run: RunDirectory) -> None:
    def fail(_: float) -> None:
        run.append_event({"event": "profile_failed", "host": "s/1", "id": ONE.id, "error": "RuntimeError: no"})

    with pytest.raises(PodlaunchError, match="no profile of host s/1: RuntimeError: no"):
        wait_for_traces(run, ONE, fail)


def test_the_command_does_not_wait_for_a_run_that_has_ended(run: RunDirectory) -> None:
    run.request_profile(ONE)
    with pytest.raises(PodlaunchError, match="ended before its profile was taken"):
        wait_for_traces(run, ONE, lambda _: run.write_status(RunStatus("r", "c", RunState.FAILED)))
    assert run.profile_requested() is None


def test_a_request_that_nobody_can_read_is_none(run: RunDirectory) -> None:
    (run.path / "profile").write_text("5 steps, please")
    assert run.profile_requested() is None
