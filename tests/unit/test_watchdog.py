"""Gangs that hang and hosts that are slow, from what the processes say; and the stacks of a process that says nothing any more."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from launcher.config import HangConfig
from launcher.gang.attempt import Attempt
from launcher.gang.evidence import HostFailure
from launcher.gang.stacks import stacks_of
from launcher.gang.stragglers import STEADY, Straggler, Stragglers
from launcher.gang.watchdog import Watchdog

CONFIG = HangConfig(steps=10, floor="60s", quiet="30m")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def phase(name: str) -> dict[str, Any]:
    return {"event": "phase", "phase": name}


def step(number: int, stall_s: float = 0.0) -> dict[str, Any]:
    return {"event": "step", "step": number, "total_steps": 1000, "stall_s": stall_s}


def watched(*events: tuple[float, dict[str, Any]]) -> tuple[Watchdog, Clock]:
    """A watchdog that has heard these events of process 0, each after so many seconds."""
    clock = Clock()
    dog = Watchdog(CONFIG, clock)
    for seconds, event in events:
        clock.now += seconds
        dog.hear(0, event)
    return dog, clock


TRAINING = [(5.0, phase("compiling")), (300.0, phase("training"))]


@pytest.mark.parametrize(
    ("events", "limit"),
    [
        ([], 1800.0),
        ([(5.0, phase("compiling"))], 1800.0),
        (TRAINING, 1800.0),  # the first step may compile
        ([*TRAINING, (90.0, step(1))], 60.0),
        ([*TRAINING, (90.0, step(1)), *((2.0, step(number)) for number in range(2, 20))], 60.0),
        ([*TRAINING, (90.0, step(1)), *((20.0, step(number)) for number in range(2, 20))], 200.0),
        ([*TRAINING, (90.0, step(1)), (200.0, step(11)), (200.0, step(21))], 200.0),  # of ten steps one was told
        ([*TRAINING, (1.0, step(1)), (2.0, step(2)), (0.0, phase("saving"))], 1800.0),
        ([*TRAINING, (1.0, step(1)), (400.0, step(2)), (0.0, phase("saving"))], 4000.0),
        ([(1.0, phase("script"))], None),
        ([(1.0, phase("script")), (9.0, step(1)), (9.0, step(2))], 1800.0),
    ],
)
def test_how_long_nothing_may_be_heard(events: list[tuple[float, dict[str, Any]]], limit: float | None) -> None:
    dog, clock = watched(*events)
    assert dog.limit == limit
    clock.now += 1e9 if limit is None else limit
    assert dog.hung() is None
    clock.now += 1.0
    assert (dog.hung() is None) is (limit is None)


def test_it_says_where_the_gang_hangs() -> None:
    dog, clock = watched(*TRAINING, (1.0, step(7)))
    clock.now += 61
    assert dog.hung() == "hung: no progress for 61 s after step 7"
    dog, clock = watched((1.0, phase("restoring")))
    clock.now += 1801
    assert dog.hung() == "hung: no progress for 1801 s in phase restoring"


def test_whoever_works_is_progress_of_all_and_noise_is_of_nobody() -> None:
    dog, clock = watched(*TRAINING, (1.0, step(7)))
    for _ in range(10):
        clock.now += 50
        dog.hear(1, step(7))
    assert dog.hung() is None
    clock.now += 61
    dog.hear(1, {"event": "noise", "text": "still here"})
    assert dog.hung() is not None


def told(slow: list[Stragglers], stalls: list[float], steps: int, first: int = 1, step_s: float = 1.0) -> list[Straggler]:
    """Three hosts tell of each step, in whatever order; every step has each host's stall."""
    found = []
    for number in range(first, first + steps):
        for index in (2, 0, 1):
            found.append(slow[0].hear(index, step(number, stalls[index] * number), number * step_s))
    return [one for one in found if one is not None]


def test_a_host_that_is_steadily_slower_is_told_of_once() -> None:
    slow = [Stragglers(["s0/0", "s0/1", "s0/2"])]
    (found,) = told(slow, [0.01, 0.41, 0.03], steps=4 * STEADY)
    assert found.host == "s0/1"
    assert found.extra_s == pytest.approx(0.39)
    assert found.step_s == pytest.approx(1.0)


def test_hosts_that_all_stall_are_no_stragglers() -> None:
    assert told([Stragglers(["a", "b", "c"])], [0.5, 0.5, 0.5], steps=4 * STEADY) == []
    assert told([Stragglers(["a", "b", "c"])], [0.01, 0.15, 0.02], steps=4 * STEADY) == [], "a little is not worth a word"


def test_a_host_that_is_slow_now_and_then_is_no_straggler() -> None:
    slow = Stragglers(["a", "b"])
    stall = 0.0
    for number in range(1, 40):
        stall += 0.9 if number % STEADY else 0.0
        assert slow.hear(0, step(number, 0.0), float(number)) is None
        assert slow.hear(1, step(number, stall), float(number)) is None


def test_steps_that_not_all_hosts_tell_of_count_nothing() -> None:
    slow = Stragglers(["a", "b"])
    for number in range(1, 100):
        assert slow.hear(0, step(number, 5.0 * number), float(number)) is None
    assert Stragglers(["alone"]).hear(0, step(1), 1.0) is None


STACKS = "process 7 is {}, 12 threads\nThread 7 (idle)"


@pytest.mark.parametrize(
    ("stacks", "host", "code"),
    [
        ([STACKS.format("sleeping"), STACKS.format("stopped"), STACKS.format("sleeping")], "b", -signal.SIGKILL),
        ([STACKS.format("sleeping"), STACKS.format("sleeping"), None], "c", None),
        ([STACKS.format("sleeping"), STACKS.format("running"), STACKS.format("sleeping")], "c", -signal.SIGKILL),
    ],
)
def test_who_keeps_the_others_waiting(stacks: list[str | None], host: str, code: int | None) -> None:
    attempt = Attempt(["a", "b", "c"], lambda: 5.0)
    for index, number in enumerate((9, 9, 8)):
        attempt.take(index, step(number))
    failure = attempt.hang(stacks, "hung")
    assert (failure.host, failure.code) == (host, code)
    assert isinstance(failure, HostFailure)
    assert "hung" in failure.describe


PROGRAM = """
import threading, time
def a_telling_name():
    print("up", flush=True)
    time.sleep(60)
threading.Thread(target=a_telling_name).start()
"""


@pytest.fixture
def process() -> Iterator["subprocess.Popen[str]"]:
    started = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "up\n"
    yield started
    started.kill()
    started.wait()
    started.stdout.close()


@pytest.mark.parametrize("stopped", [False, True])
def test_the_stacks_of_a_process_are_read_also_when_it_is_stopped(process: "subprocess.Popen[str]", stopped: bool) -> None:
    if stopped:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    found = stacks_of(process.pid)
    assert found.startswith(f"process {process.pid} is ")
    assert found.startswith(f"process {process.pid} is {psutil.STATUS_STOPPED}") is stopped
    assert "a_telling_name" in found


def test_a_process_that_is_gone_has_no_stacks() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert "cannot be looked at" in stacks_of(gone.pid)
