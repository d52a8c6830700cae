"""Places that keep killing slices: asked less often, and then not at all for a while.

As marin-community/marin's Iris does it (`backoff_detector.py`): of the slices of the last half hour, 20, 50 or 80 % short-lived ones slow
creation down to a half, to a tenth, or stop it. A slice that lived long before it was preempted, or that was deleted because nobody
wanted it, counts as a good one.
"""

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from cluster.durations import short_duration
from cluster.tpu.errors import TPUError

BASE_PAUSE_S = 30.0
"""From one slice to the next at full speed: about what a refused zone is left alone for."""
LEAST = 3
"""So few ends tell nothing about a place."""
_SLOWER = (2.0, 10.0)
"""For the first two thresholds; the third stops."""
Place = tuple[str, str]
"""Kind of slice and zone."""


class ShortLivedError(TPUError):
    """Slices do not live long in a zone."""

    summary = "slices die young there"
    next_step = "add zones to the configuration, or use provisioning=on-demand"
    another_zone_may_help = True


@dataclass(frozen=True)
class Verdict:
    """A place that is slowed down."""

    place: Place
    pause_s: float
    words: str


class Churn:
    """Counts how slices end, one listing after the other."""

    def __init__(self, clock: Callable[[], float], window_s: float, short_s: float, thresholds: Sequence[float]) -> None:
        """`clock`: seconds. `short_s`: a slice that was READY for less is short-lived. `thresholds`: shares of them, three."""
        self._clock, self._window, self._short, self._thresholds = clock, window_s, short_s, thresholds
        self._born: dict[str, tuple[Place, float]] = {}
        self._ends: dict[Place, deque[tuple[float, bool]]] = {}
        self._first = True

    def take(self, ready: Mapping[str, Place], dismissed: Collection[str]) -> list[Verdict]:
        """`ready`: the slices that are READY now. `dismissed`: those that ended because nobody wanted them.

        Returns the places where a short-lived one has ended just now and that have too many of them.
        """
        now = self._clock()
        # What is there at the first look has lived for nobody knows how long.
        born = float("-inf") if self._first else now
        self._first = False
        struck: set[Place] = set()
        for name, (place, since) in list(self._born.items()):
            if name not in ready:
                del self._born[name]
                short = name not in dismissed and now - since < self._short
                self._ends.setdefault(place, deque()).append((now, short))
                if short:
                    struck.add(place)
        for name, place in ready.items():
            self._born.setdefault(name, (place, born))
        for ends in self._ends.values():
            while ends and now - ends[0][0] > self._window:
                ends.popleft()
        return [verdict for place in sorted(struck) if (verdict := self._judge(place, now)) is not None]

    def _judge(self, place: Place, now: float) -> Verdict | None:
        ends = self._ends[place]
        grown = sum(1 for at, since in self._born.values() if at == place and now - since >= self._short)
        bad, total = sum(short for _, short in ends), len(ends) + grown
        level = sum(bad / total >= threshold for threshold in self._thresholds)
        if total < LEAST or level == 0:
            return None
        pause = self._window if level > len(_SLOWER) else BASE_PAUSE_S * _SLOWER[level - 1]
        words = f"{bad} of {total} slices lived less than {short_duration(self._short)} in the last {short_duration(self._window)}"
        return Verdict(place, pause, words)
