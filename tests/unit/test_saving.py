"""When to save: by steps, by time, by cost and failures; decided by process 0, the same on all. No JAX, no waiting."""

import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from launcher.training.history import history_of
from launcher.training.saving import (
    PRIOR_MTBF_S,
    UNMEASURED_S,
    Every,
    History,
    SaveCost,
    best_interval,
    make_saving,
    mean_time_between_failures,
    parse_every,
)


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("value", "expected"),
    [(20, Every(steps=20)), ("20", Every(steps=20)), ("10m", Every(seconds=600.0)), ("1h30m", Every(seconds=5400.0)), ("auto", Every())],
)
def test_steps_times_and_auto_are_understood(value: int | str, expected: Every) -> None:
    assert parse_every(value) == expected


@pytest.mark.parametrize("value", [0, -5, "0", "", "often", "0s", "10 minutes"])
def test_anything_else_is_refused_in_one_line(value: int | str) -> None:
    with pytest.raises(ConfigError, match=r"trainer.checkpoint_every .*: give steps \(20\), a length of time \(90s, 10m, 2h\) or auto"):
        parse_every(value)


def saves(every: Every, step_times: Iterator[float], steps: int, cost: SaveCost | None = None, first: int = 0) -> tuple[list[float], int]:
    """When it saves, in seconds after the beginning, and how often the processes had to agree."""
    clock, asked = Clock(), 0

    def agree(value: int) -> int:
        nonlocal asked
        asked += 1
        return value

    saving = make_saving(every, first, agree=agree, cost=lambda: cost, history=History(), clock=clock)
    times = []
    for step in range(first + 1, first + steps + 1):
        clock.now += next(step_times)
        if saving.due(step):
            times.append(clock.now - 1000.0)
    return times, asked


def steady(seconds: float) -> Iterator[float]:
    while True:
        yield seconds


def test_by_steps_nothing_has_to_be_agreed() -> None:
    assert saves(Every(steps=20), steady(1.0), 65) == ([20.0, 40.0, 60.0], 0)


@pytest.mark.parametrize("step_s", [0.1, 0.7, 5.0, 45.0])
@pytest.mark.parametrize("first", [0, 1234])
def test_by_time_it_saves_within_half_a_step_of_the_time(step_s: float, first: int) -> None:
    times, asked = saves(Every(seconds=60.0), steady(step_s), int(600 / step_s), first=first)
    gaps = [later - sooner for sooner, later in zip([0.0, *times], times, strict=False)]
    assert len(times) >= 9
    assert all(abs(gap - 60.0) <= step_s / 2 + 1e-6 for gap in gaps)
    assert asked <= len(times) * (4 + math.log2(60.0 / step_s + 2))


def test_steps_that_become_slow_delay_a_save_by_a_bounded_time() -> None:
    def slower() -> Iterator[float]:
        for _ in range(100):
            yield 0.1
        while True:
            yield 1.0

    times, _ = saves(Every(seconds=60.0), slower(), 400)
    assert times[0] < 60.0 * 6  # half of the steps that seemed to be left, at ten times the price
    assert all(abs(later - sooner - 60.0) < 15 for sooner, later in itertools.pairwise(times[1:]))


def test_steps_longer_than_the_interval_save_every_time() -> None:
    times, _ = saves(Every(seconds=10.0), steady(60.0), 5)
    assert times == [60.0, 120.0, 180.0, 240.0, 300.0]


@given(st.lists(st.tuples(st.floats(0.01, 30), st.floats(0.01, 30)), min_size=50, max_size=200))
def test_two_processes_with_different_clocks_save_at_the_same_steps(times: list[tuple[float, float]]) -> None:
    clocks, told = (Clock(), Clock()), [0]

    def tell(value: int) -> int:
        told[0] = value
        return value

    every = Every(seconds=40.0)
    main = make_saving(every, 0, agree=tell, cost=lambda: None, history=History(), clock=clocks[0])
    other = make_saving(every, 0, agree=lambda _: told[0], cost=lambda: SaveCost(9.0, 9.0), history=History(7), clock=clocks[1])
    for step, passed in enumerate(times, 1):
        for clock, seconds in zip(clocks, passed, strict=True):
            clock.now += seconds
        assert main.due(step) == other.due(step)


def test_auto_is_youngs_interval() -> None:
    assert best_interval(SaveCost(0.5, 2.0), History(), 0.0) == pytest.approx(math.sqrt(2 * 0.5 * PRIOR_MTBF_S))
    assert best_interval(SaveCost(0.5, 2.0), History(3, 5000.0), 1000.0) == pytest.approx(math.sqrt((PRIOR_MTBF_S + 6000.0) / 4))
    assert best_interval(None, History(), 0.0) == UNMEASURED_S


def test_auto_never_writes_more_than_half_of_the_time() -> None:
    assert best_interval(SaveCost(0.001, 300.0), History(50), 0.0) == 600.0


def test_failures_shorten_the_interval_and_time_without_one_lengthens_it() -> None:
    assert mean_time_between_failures(History(), 0.0) == PRIOR_MTBF_S
    assert mean_time_between_failures(History(failures=9), 0.0) == PRIOR_MTBF_S / 10
    assert mean_time_between_failures(History(failures=0, seconds=86400.0), 3600.0) == PRIOR_MTBF_S + 90000.0


def test_auto_saves_first_to_measure_and_then_by_the_measured_cost() -> None:
    times, _ = saves(Every(), steady(1.0), 1000, SaveCost(0.1, 0.2))
    assert times[0] == pytest.approx(math.sqrt(2 * 0.1 * PRIOR_MTBF_S), abs=1.0)
    assert saves(Every(), steady(1.0), 100)[0] == [UNMEASURED_S]


def state(time: float, name: str) -> dict[str, object]:
    return {"time": time, "event": "state", "state": name}


def test_history_counts_recoveries_and_the_time_in_training() -> None:
    events = [
        state(0.0, "QUEUED"),
        state(10.0, "RUNNING"),
        {"time": 50.0, "event": "checkpoint", "step": 20},
        state(110.0, "RECOVERING"),
        state(130.0, "RUNNING"),
        state(150.0, "STOPPED"),
        state(900.0, "QUEUED"),
        state(910.0, "RUNNING"),
        {"time": 915.0, "event": "checkpoint", "step": 40},  # the supervisor died: nobody saw the end
    ]
    assert history_of(events) == History(failures=1, seconds=125.0)
    assert history_of([]) == History()
