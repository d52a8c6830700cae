"""A sweep: many runs, so many at a time, until all have ended. What it knows is in the run directories, so that it can be taken up again.

A point that has no run yet, or whose run ended without success, waits for its turn; one whose run goes on is followed; one whose run has
succeeded is done (launcher/sweep_places.py). How a run is started is not known here (launcher/sweep_runs.py).
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console

from cluster.errors import PodlaunchError
from launcher.runs import RunDirectory
from launcher.sweep_places import Place, Standing
from launcher.sweep_points import Point
from launcher.sweep_view import Display, print_detached, print_summary, write_results
from launcher.watch import HeadGone

TRIES = 3
"""So often a point is started in vain before it counts as failed: a head that is about to go refuses before it is gone."""
PAUSE_S = 5.0
"""After each of these."""


class NotNow(PodlaunchError):
    """Nothing can be started at the moment; later it can."""


class Detached(Exception):
    """Somebody wants to see no more of it; how to go on is said."""


class Runs(Protocol):
    """What a sweep asks of clusters and of those who start runs on them."""

    def find(self, point: Point) -> RunDirectory:
        """The directory of its run, which may not be there yet."""

    def check(self, places: Sequence[Place]) -> None:
        """Raises ConfigError, which names the point, when any of them cannot be started. Changes nothing."""

    def bring_up(self, places: Sequence[Place]) -> None:
        """Whatever the points need to run on. Raises PodlaunchError."""

    def most(self, point: Point) -> int:
        """How many points like this one there are slices for at once."""

    def start(self, place: Place) -> None:
        """Raises NotNow, HeadGone when there is nothing to start it on, another PodlaunchError when just this one cannot be started."""

    def trouble(self, under_way: Sequence[Place]) -> str | None:
        """What a person should know now about these. Raises HeadGone when they go on only once a person has done something."""


class Sweep:
    """What one command works through. A sweeper hands it all points at once, or batch by batch."""

    def __init__(
        self,
        console: Console,
        runs: Runs,
        folder: Path,
        max_concurrent: int | None,
        command: str,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`folder`: for results.csv. `max_concurrent`: None for as many as there are slices for. `command`: the one that goes on with the
        sweep. `clock`: seconds since the epoch.
        """
        self._console, self._runs, self._folder, self._max, self._command = console, runs, folder, max_concurrent, command
        self._clock, self._sleep = clock, sleep
        self._all: dict[str, Place] = {}
        self._pause_until = float("-inf")
        self._pause_words: str | None = None

    def work_through(self, points: Sequence[Point]) -> list[Place]:
        """Returns when all have ended, in the order of the points. Two equal points are one run.

        Raises ConfigError before anything is started, PodlaunchError when nothing can go on, and Detached after Ctrl-C: runs that are
        under way stay so.
        """
        batch: dict[str, Place] = {}
        for point in points:
            if point.run_id not in batch:
                batch[point.run_id] = self._all.get(point.run_id) or self._find(point)
        places = list(batch.values())
        self._runs.check([place for place in places if place.standing is Standing.WAITING])
        self._tell(places)
        if unfinished := [place for place in places if place.standing is not Standing.ENDED]:
            self._runs.bring_up(unfinished)
            for place in unfinished:
                place.find()  # those that `tpu stop --keep-runs` suspended go on by that
        self._all |= batch
        try:
            self._follow(places)
        except KeyboardInterrupt:
            print_detached(self._console, places, self._command)
            raise Detached from None
        except HeadGone as error:
            raise HeadGone(f"{error}; go on with the sweep by the same command: {self._command}") from error
        finally:
            results = write_results(self._folder, self._all.values())
        print_summary(self._console, places, self._all.values(), results)
        return [batch[point.run_id] for point in points]

    def _find(self, point: Point) -> Place:
        place = Place(point, self._runs.find(point))
        place.find()
        return place

    def _tell(self, places: Sequence[Place]) -> None:
        known = [
            f"{count} {words}"
            for standing, words in ((Standing.ENDED, "done"), (Standing.UNDER_WAY, "under way"))
            if (count := sum(place.standing is standing for place in places))
        ]
        most = self._runs.most(places[0].point) if self._max is None else self._max
        already = f" ({', '.join(known)})" if known else ""
        self._say(f"sweep       {len(places)} points{already}, at most {most} at once")

    def _follow(self, places: Sequence[Place]) -> None:
        told: str | None = None
        with Display(self._console, self._clock) as display:
            while True:
                said = self._look(places)
                display.show(places)
                if all(place.standing is Standing.ENDED for place in places):
                    return
                if (under_way := _under_way(places)) and said is None:
                    said = self._runs.trouble(under_way)
                if said is not None and said != told:
                    self._say(said)
                told = said
                self._sleep(max(place.run.poll_s for place in places))

    def _look(self, places: Sequence[Place]) -> str | None:
        """See who has ended, and start who has room. Returns what keeps the others from being started, beside that it is not their turn."""
        for place in _under_way(places):
            place.follow()
            if place.standing is Standing.ENDED:
                write_results(self._folder, self._all.values())
        if self._clock() < self._pause_until:
            return self._pause_words
        for place in places:
            if place.standing is Standing.WAITING and self._has_room(place.point, _under_way(places)):
                try:
                    self._start(place)
                except NotNow as words:
                    return str(words)
        return None

    def _has_room(self, point: Point, under_way: Sequence[Place]) -> bool:
        if self._max is not None:
            return len(under_way) < self._max
        kind = _slices_of(point)
        return sum(_slices_of(place.point) == kind for place in under_way) < self._runs.most(point)

    def _start(self, place: Place) -> None:
        place.find()
        if place.standing is not Standing.WAITING:  # another command was faster
            return
        try:
            self._runs.start(place)
        except (NotNow, HeadGone):
            raise
        except PodlaunchError as error:
            place.refusals += 1
            if place.refusals < TRIES:
                self._pause_until = self._clock() + PAUSE_S
                self._pause_words = f"{place.point.run_id} could not be started and is tried again: {error}"
                raise NotNow(self._pause_words) from error
            place.status, place.standing, place.error = place.run.status(), Standing.ENDED, str(error)
            return
        place.standing = Standing.UNDER_WAY
        place.follow()

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


def _under_way(places: Sequence[Place]) -> list[Place]:
    return [place for place in places if place.standing is Standing.UNDER_WAY]


def _slices_of(point: Point) -> tuple[str, str]:
    """Points of one cluster that use the same type of slice take room from each other."""
    return point.config.cluster.name, point.config.slices.kind
