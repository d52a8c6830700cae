"""When to save: every so many steps, every so much time, or at the interval that loses the least time. Knows no files and no JAX.

    trainer.checkpoint_every=20      steps
    trainer.checkpoint_every=10m     time: s, m, h, d
    trainer.checkpoint_every=auto    from what a save costs and how often the run fails

All hosts must save at the same step. Steps are the same everywhere; clocks are not. So where time decides, process 0 decides, and says
in advance at which step it will be asked again: a few broadcasts an interval, not one a step, since each of them waits for the device.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cluster.durations import parse_duration
from cluster.errors import ConfigError

AUTO = "auto"
PRIOR_MTBF_S = 4 * 3600.0
"""What is assumed of a run that has not failed yet, weighing as much as one failure: a guess, on the side of spot capacity."""
UNMEASURED_S = 60.0
"""The interval of `auto` before the first save has shown what one costs."""
WRITING_SHARE = 0.5
"""At most this share of the time something is being written in the background, which takes memory, network and processor."""


@dataclass(frozen=True)
class Every:
    """`trainer.checkpoint_every`: steps or seconds; neither is `auto`."""

    steps: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class SaveCost:
    """What one save takes."""

    blocking_s: float
    """For how long training stands still."""
    write_s: float
    """Until the checkpoint counts, from the same moment; training goes on meanwhile."""


@dataclass(frozen=True)
class History:
    """How often a run has failed so far, and how long it has trained."""

    failures: int = 0
    seconds: float = 0.0


class Saving(Protocol):
    """Answers once a step whether to save."""

    def due(self, step: int) -> bool:
        """Whether to save after `step`. Every process asks for every step, in order, and gets the same answer."""
        ...


def parse_every(value: int | str) -> Every:
    """Raises ConfigError for what is neither steps, nor a length of time, nor `auto`."""
    if value == AUTO:
        return Every()
    if isinstance(value, int) or value.isdecimal():
        if int(value) >= 1:
            return Every(steps=int(value))
    else:
        try:
            return Every(seconds=parse_duration(value))
        except ValueError:
            pass  # told below, in the setting's own words
    raise ConfigError(f"trainer.checkpoint_every {value!r}: give steps (20), a length of time (90s, 10m, 2h) or auto")


def make_saving(
    every: Every,
    first: int,
    *,
    agree: Callable[[int], int],
    cost: Callable[[], SaveCost | None],
    history: History,
    clock: Callable[[], float] = time.monotonic,
) -> Saving:
    """For a loop that has done `first` steps. `agree` gives process 0's number to all processes: only its cost and history count."""
    if every.steps is not None:
        return SaveBySteps(every.steps)
    if every.seconds is not None:
        seconds = every.seconds
        return SaveByTime(first, lambda _: seconds, agree, clock)
    return SaveByTime(first, lambda trained: best_interval(cost(), history, trained), agree, clock)


def best_interval(cost: SaveCost | None, history: History, trained_s: float) -> float:
    """Seconds between saves that lose the least: sqrt(2 x blocking time x mean time between failures).

    Young, "A first order approximation to the optimum checkpoint interval", CACM 17 (1974); Daly (2006) adds terms that matter only
    when a save takes as long as a failure is away. What is written in the background costs training nothing, so it is no part of the
    cost, but it bounds how often one can save. `trained_s`: seconds since this attempt began.
    """
    if cost is None:
        return UNMEASURED_S
    return max(math.sqrt(2 * cost.blocking_s * mean_time_between_failures(history, trained_s)), cost.write_s / WRITING_SHARE)


def mean_time_between_failures(history: History, trained_s: float) -> float:
    """Seconds: time over failures, both counted from a prior of one failure in PRIOR_MTBF_S (the mean of a gamma-Poisson posterior)."""
    return (PRIOR_MTBF_S + history.seconds + trained_s) / (1 + history.failures)


class SaveBySteps:
    """At multiples of a number of steps."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def due(self, step: int) -> bool:
        return step % self._steps == 0


class SaveByTime:
    """When so much time has passed since the last save began; `interval` is given the seconds since the loop began."""

    def __init__(self, first: int, interval: Callable[[float], float], agree: Callable[[int], int], clock: Callable[[], float]) -> None:
        self._interval, self._agree, self._clock = interval, agree, clock
        self._first, self._began = first, clock()
        self._saved = self._began
        self._ask_at = first + 1

    def due(self, step: int) -> bool:
        if step < self._ask_at:
            return False
        ahead = self._agree(self._steps_ahead(step))
        self._ask_at = step + max(1, ahead)
        if ahead == 0:
            self._saved = self._clock()
        return ahead == 0

    def _steps_ahead(self, step: int) -> int:
        """0: save now; else after how many steps to ask again. Half of the way each time: steps may get faster or slower."""
        now = self._clock()
        step_s = (now - self._began) / (step - self._first)
        left = self._interval(now - self._began) - (now - self._saved)
        if left < step_s / 2:
            return 0
        steps = left / step_s if step_s > 0 else 1.0
        return max(1, round(steps if steps < 4 else min(steps / 2, MOST_STEPS_AHEAD)))


MOST_STEPS_AHEAD = 1000
"""However fast the first steps were."""
