"""How a host's Ray is kept up: real processes in Ray's place, and a clock of the test's own."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster import processes
from cluster.errors import PodlaunchError
from cluster.processes import ProcessRecord
from cluster.vm.host_ray import FAILING, HEALTHY_S, RETRY_S, HostRay

SLEEP = "import time; print('up', flush=True); time.sleep(60)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP


class Machine:
    """Starts processes in Ray's place, and ends what is left of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = 1000.0
        self.started: list[ProcessRecord] = []

    def clock(self) -> float:
        return self.now

    def start(self, program: str = SLEEP) -> ProcessRecord:
        log = self.folder / f"{len(self.started)}.out"
        record = processes.spawn([sys.executable, "-c", program], marker="test-ray", env={}, log=log, cwd=self.folder)
        self.started.append(record)
        until(lambda: "up" in log.read_text())
        return record

    def kill(self) -> None:
        psutil.Process(self.started[-1].pid).kill()
        until(lambda: not self.started[-1].alive())

    def keeper(self, rejoin_after: float = 0.0) -> HostRay:
        return HostRay(self.start, self.folder, self.clock, rejoin_after=rejoin_after)

    def restart_after(self, keeper: HostRay, lived: float) -> float:
        """Let it die after it `lived` so many seconds; the pause until it is started again."""
        self.now += lived
        self.kill()
        keeper.tick(may_start=True)
        died, count = self.now, len(self.started)
        while len(self.started) == count:
            self.now += 0.5
            keeper.tick(may_start=True)
        return self.now - died


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # another process


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    for record in made.started:
        processes.kill_members(record.marker)
        processes.reap(record)


def test_it_is_started_when_it_may_be_and_not_before(machine: Machine) -> None:
    keeper = machine.keeper()
    keeper.tick(may_start=False)
    assert machine.started == []
    keeper.tick(may_start=True)
    keeper.tick(may_start=True)
    assert keeper.up
    assert len(machine.started) == 1


def test_a_start_that_cannot_be_tried_is_tried_again_later(machine: Machine) -> None:
    tries: list[float] = []

    def start() -> ProcessRecord:
        tries.append(machine.now)
        if len(tries) < 3:
            raise PodlaunchError("no right to read the token yet")
        return machine.start()

    keeper = HostRay(start, machine.folder, machine.clock)
    for _ in range(30):
        with contextlib.suppress(PodlaunchError):
            keeper.tick(may_start=True)
        machine.now += 1
    assert keeper.up
    assert tries == [1000, 1000 + RETRY_S, 1000 + 2 * RETRY_S]


def test_pauses_grow_and_begin_anew_after_a_healthy_life(machine: Machine) -> None:
    keeper = machine.keeper()
    keeper.tick(may_start=True)
    assert [machine.restart_after(keeper, lived=0) for _ in range(4)] == [1, 2, 4, 8]
    assert machine.restart_after(keeper, lived=HEALTHY_S) == 1


def test_worker_0_that_had_joined_leaves_time_for_the_slice_to_be_deleted(machine: Machine) -> None:
    keeper = machine.keeper(rejoin_after=60.0)
    keeper.tick(may_start=True)
    assert machine.restart_after(keeper, lived=1) == 1, "it had not joined"
    assert machine.restart_after(keeper, lived=30) == 60


def test_a_host_that_cannot_be_kept_up_is_failing_until_it_lives(machine: Machine) -> None:
    keeper = machine.keeper()
    keeper.tick(may_start=True)
    failing = []
    for _ in range(FAILING):
        failing.append(keeper.failing)
        machine.restart_after(keeper, lived=0)
    assert failing == [False] * FAILING
    failing = [keeper.failing]
    machine.restart_after(keeper, lived=HEALTHY_S)
    assert [*failing, keeper.failing] == [True, False]


def test_a_new_agent_takes_over_what_the_one_before_started(machine: Machine) -> None:
    machine.keeper().tick(may_start=True)
    second = machine.keeper()
    up = [second.up]
    second.tick(may_start=True)
    assert len(machine.started) == 1
    machine.kill()
    second.tick(may_start=True)
    assert [*up, second.up] == [True, False]
    assert not machine.keeper().up, "the record of a dead one is nothing to take over"


def test_worker_0_that_was_taken_over_had_joined(machine: Machine) -> None:
    machine.keeper().tick(may_start=True)
    assert machine.restart_after(machine.keeper(rejoin_after=60.0), lived=0) == 60


def test_ray_is_asked_first_and_killed_whole_after_the_grace(machine: Machine) -> None:
    keeper = machine.keeper()
    keeper.tick(may_start=True)
    keeper.end(20.0)
    assert not machine.started[0].alive()

    deaf = HostRay(lambda: machine.start(DEAF), machine.folder, time.monotonic)
    deaf.tick(may_start=True)
    deaf.end(0.2)
    until(lambda: not machine.started[-1].alive())


def test_what_a_dead_ray_leaves_behind_is_killed_before_the_next_one(machine: Machine) -> None:
    program = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); " + SLEEP
    keeper = HostRay(lambda: machine.start(program), machine.folder, machine.clock)
    keeper.tick(may_start=True)
    leader = psutil.Process(machine.started[0].pid)
    (child,) = leader.children()
    machine.kill()
    keeper.tick(may_start=True)
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("dies", [False, True], ids=["living", "dead"])
def test_what_is_of_no_use_any_more_is_replaced_without_a_pause_once_it_may(machine: Machine, dies: bool) -> None:
    keeper = machine.keeper(rejoin_after=60.0)
    keeper.tick(may_start=True)
    machine.now += 30
    if dies:
        machine.kill()
    keeper.tick(may_start=False, replace=True)
    assert (keeper.up, len(machine.started)) == (not dies, 1)
    for _ in range(2):
        keeper.tick(may_start=True, replace=keeper.since < machine.now)
    assert len(machine.started) == 2
    assert keeper.since == machine.now
    until(lambda: not machine.started[0].alive())


def test_a_drain_is_asked_for_by_sigterm(machine: Machine) -> None:
    keeper = machine.keeper()
    keeper.tick(may_start=True)
    keeper.ask_to_end()
    assert psutil.Process(machine.started[0].pid).wait(20) == -signal.SIGTERM


def test_nothing_is_asked_of_what_is_not_there(machine: Machine) -> None:
    keeper = machine.keeper()
    keeper.ask_to_end()
    keeper.end(1.0)
    assert not keeper.up
