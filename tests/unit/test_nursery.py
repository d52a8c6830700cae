"""A host's warm process is lent to one runner and dies with it. Real processes, no JAX, no Ray."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.vm.host_dir import HOST_DIR_VARIABLE, read_companion
from launcher.gang import nursery as nursery_module
from launcher.gang.child import Event
from launcher.gang.nursery import Borrowing, Nursery, Warm, borrow, listen
from launcher.gang.runner import Runner
from launcher.runs import RunDirectory
from tests.script_run import make_script_run

WARM = "from launcher.training import warm; warm.LIBRARIES = (); warm.main()"
"""Imports nothing, so that it becomes a new Python when its orders come."""
WAITS = """
import os, sys, time
from launcher.training import script
print(os.environ["OWN"], os.getpid(), os.environ.get("HOST_ONLY"), flush=True)
script.preempted()
script.report(1)
while not script.preempted():
    if os.path.exists("end"):
        sys.exit(7)
    time.sleep(0.01)
"""
LIMIT_S = 60.0


class Host:
    """A nursery in a thread of its own, as on a host it is a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nursery = Nursery(listen(folder), lambda: Warm.start(["-c", WARM]), after=0.0)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._live)
        self._thread.start()

    def _live(self) -> None:
        while not self._ending.is_set():
            self.nursery.turn()
        self.nursery.end()

    def warm(self) -> int:
        """Waits for it; the id of the process."""
        eventually(lambda: self.nursery.pid is not None)
        assert self.nursery.pid is not None
        return self.nursery.pid

    def end(self) -> None:
        self._ending.set()
        if (borrowing := borrow(self.folder)) is not None:  # wakes it, unless it was awake
            give_back(borrowing)
        self._thread.join(LIMIT_S)


def give_back(borrowing: Borrowing | None) -> None:
    assert borrowing is not None
    borrowing.connection.close()
    if borrowing.lent is not None:
        borrowing.lent[1].close()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    folder = tmp_path / ("h" * 120)  # longer than the path of a socket may be
    folder.mkdir()
    monkeypatch.setenv("HOST_ONLY", "of the host")
    made = Host(folder)
    monkeypatch.delenv("HOST_ONLY")
    yield made
    made.end()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return make_script_run(tmp_path, WAITS)


@pytest.fixture
def runner(run: RunDirectory, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    monkeypatch.setenv("PODLAUNCH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv(HOST_DIR_VARIABLE, str(host.folder))
    host.warm()
    made = Runner(str(run.path), 0, first=0)
    yield made
    made.kill()
    if made._spare is not None:
        made._spare.signal(signal.SIGKILL)
        assert made._spare.wait(LIMIT_S)
    if made._nursery is not None:
        made._nursery.connection.close()


def start(runner: Runner, attempt: int = 0) -> None:
    runner.start(attempt, {"OWN": f"own-{attempt}", "PODLAUNCH_PROCESS_ID": "0"}, f"logs/{attempt}/host-0.log", None)


def follow(runner: Runner, kind: str) -> Event:
    for _ in range(100):
        for event in runner.next_events(1.0):
            if event["event"] == kind:
                return event
    raise AssertionError(f"no {kind} came")


def test_a_run_takes_the_warm_process_with_its_own_environment_and_log(runner: Runner, run: RunDirectory, host: Host) -> None:
    assert read_companion(host.folder) == list(nursery_module.COMMAND)
    assert runner._spare is not None
    pid = runner._spare.pid
    start(runner)
    follow(runner, "step")
    assert runner._child is not None
    assert runner._child.pid == pid
    assert (run.path / "logs" / "0" / "host-0.log").read_text().split() == ["own-0", str(pid), "None"]
    runner.terminate()
    assert follow(runner, "exit")["code"] == 128 + signal.SIGTERM


def test_its_exit_code_and_its_death_are_told_as_of_a_child(runner: Runner, run: RunDirectory) -> None:
    start(runner)
    follow(runner, "step")
    (run.path / "work" / "host-0" / "end").touch()
    assert follow(runner, "exit")["code"] == 7


def test_a_kill_is_told_and_the_next_attempt_is_the_runners_own(runner: Runner) -> None:
    start(runner)
    follow(runner, "step")
    assert runner._child is not None
    os.kill(runner._child.pid, signal.SIGKILL)
    assert follow(runner, "exit")["code"] == -signal.SIGKILL
    start(runner, 1)
    follow(runner, "step")
    assert psutil.Process(runner._child.pid).ppid() == os.getpid()


def test_it_dies_with_its_runner_and_only_then_another_is_warmed(runner: Runner, host: Host) -> None:
    start(runner)
    follow(runner, "step")
    assert runner._child is not None
    assert runner._nursery is not None
    assert host.nursery.pid is None
    pid = runner._child.pid
    runner._nursery.connection.shutdown(2)  # as the kernel does for a runner that was killed
    assert runner._child.wait(LIMIT_S)
    eventually(lambda: not psutil.pid_exists(pid))  # the nursery collects it, which takes a moment
    assert host.warm() != pid


def test_a_warm_process_that_died_is_none(host: Host) -> None:
    os.kill(host.warm(), signal.SIGKILL)
    eventually(lambda: host.nursery.pid is None)
    borrowing = borrow(host.folder)
    assert borrowing is not None
    assert borrowing.lent is None
    give_back(borrowing)


def test_without_a_nursery_there_is_nothing_to_borrow(tmp_path: Path) -> None:
    assert borrow(tmp_path) is None
    listen(tmp_path).close()
    assert borrow(tmp_path) is None


def test_a_nursery_that_is_killed_takes_its_process_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOST_DIR_VARIABLE, str(tmp_path))
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path / "state"))
    program = (
        "import launcher.gang.nursery as n; from launcher.gang.nursery import *;"
        f"nursery = Nursery(listen(Path({str(tmp_path)!r})), lambda: Warm.start(['-c', {WARM!r}]), after=0.0)\n"
        "while True: nursery.turn()"
    )
    process = psutil.Popen([sys.executable, "-c", program])
    try:
        eventually(lambda: (tmp_path / "nursery.sock").exists() and bool(process.children()))
        borrowing = borrow(tmp_path)
        assert borrowing is not None
        assert borrowing.lent is not None
        lent = borrowing.lent[0]
        process.kill()
        assert lent.wait() == -signal.SIGKILL
        eventually(lambda: not psutil.pid_exists(lent.pid))
        give_back(borrowing)
    finally:
        process.kill()
        process.wait()
