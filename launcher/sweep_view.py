"""What a person sees of a sweep: a live table on a terminal, else plain lines; at the end the table, the best point and results.csv."""

import csv
import io
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.state import write_atomic_bytes
from launcher.follow import clock_text, loss_text, step_text
from launcher.sweep_places import Place, Standing

RESULTS = "results.csv"
_FRAME = 6
"""Lines of a terminal that are not for the points."""


class Display:
    """Shows the points as they stand, from when it is entered until it is left."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        """`clock`: seconds since the epoch."""
        self._console, self._clock = console, clock
        self._began = clock()
        self._told: dict[str, str] | None = None
        self._live: Live | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = self._stack.enter_context(Live(console=self._console, refresh_per_second=4, transient=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def show(self, places: Sequence[Place]) -> None:
        if self._live is not None:
            room = max(1, self._console.height - _FRAME)
            self._live.update(table(in_sight(places, room), self._clock()), refresh=True)
            return
        if self._told is None:  # what is done already is in the table at the end
            self._told = {place.point.run_id: place.state for place in places if place.standing is Standing.ENDED}
        for place in places:
            if place.standing is not Standing.WAITING and place.state != self._told.get(place.point.run_id):
                self._told[place.point.run_id] = place.state
                words = f"{clock_text(self._clock() - self._began)}  {place.point.run_id}  {place.state}{_how(place)}"
                self._console.print(words, highlight=False, soft_wrap=True, markup=False)


def table(places: Iterable[Place], now: float) -> Table:
    """`now`: seconds since the epoch."""
    made = Table("ID", "overrides", "STATUS", "STEP", "LOSS", "RECOVERIES", "DURATION", box=None)
    for place in places:
        cells = ("", "", "", "")
        if (status := place.status) is not None and place.standing is not Standing.WAITING:
            until = now if place.standing is Standing.UNDER_WAY else status.ended_at or status.updated_at
            cells = (step_text(status), loss_text(status), str(status.recoveries.total), clock_text(until - status.started_at))
        made.add_row(*(Text(text, overflow="fold") for text in (place.point.run_id, place.point.words, place.state, *cells)))
    return made


def in_sight(places: Sequence[Place], room: int) -> list[Place]:
    """Those that a person wants to see where there is no room for all: what goes on first, then what failed."""

    def order(place: Place) -> int:
        return 0 if place.standing is Standing.UNDER_WAY else 1 if place.failure is not None else 2

    return list(places) if len(places) <= room else sorted(places, key=order)[:room]


def print_summary(console: Console, places: Sequence[Place], every: Collection[Place], results: Path) -> None:
    """`places`: those that have just ended; `every`: with those of earlier batches, among which the best is."""
    console.print()
    console.print(table(places, 0.0))
    console.print()
    _line(console, "result", f"{sum(place.succeeded for place in places)} of {len(places)} points SUCCEEDED")
    for place in places:
        if place.failure is not None:
            _line(console, "failed", f"{place.point.run_id} ({place.point.words}): {place.failure}")
    if (best := best_of(every)) is not None:
        kind = "loss" if best.status is None or best.status.held_out_after is None else "held-out loss"
        _line(console, "best", f"{best.point.run_id} ({best.point.words}): {kind} {best.score:.4f}")
    _line(console, "results", str(results))


def print_detached(console: Console, places: Sequence[Place], command: str) -> None:
    under_way = [place for place in places if place.standing is Standing.UNDER_WAY]
    waiting = sum(place.standing is Standing.WAITING for place in places)
    console.print()
    _line(console, "detached", f"{len(under_way)} points go on, {waiting} wait until the sweep goes on")
    _line(console, "go on", command)
    for place in under_way:
        _line(console, "stop one", f"tpu train stop {place.run.url}")


def best_of(places: Iterable[Place]) -> Place | None:
    """The one with the lowest loss; of equal ones the first."""
    scored = [(score, place) for place in places if (score := place.score) is not None and math.isfinite(score)]
    return min(scored, key=lambda one: one[0])[1] if scored else None


def write_results(folder: Path, places: Iterable[Place]) -> Path:
    """Replace results.csv: one line a point, with what differs among the points in columns of its own."""
    rows = [_row(place) for place in places]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic_bytes(folder / RESULTS, text.getvalue().encode())
    return folder / RESULTS


def _row(place: Place) -> Mapping[str, Any]:
    status = None if place.standing is Standing.WAITING else place.status
    return {
        "run": place.point.run_id,
        **{key: value for key, _, value in (override.partition("=") for override in place.point.overrides)},
        "state": place.state,
        "step": status and status.step,
        "loss": status and status.loss,
        "held_out_loss": status and status.held_out_after,
        "recoveries": status and status.recoveries.total,
        "started_at": status and status.started_at,
        "ended_at": status and status.ended_at,
        "cost_usd": status and status.cost_usd,
        "failure": place.failure,
        "directory": place.run.url,
    }


def _how(place: Place) -> str:
    if place.failure is not None:
        return f": {place.failure.removeprefix(f'{place.state}, ').removeprefix(f'{place.state}: ')}"
    return f"  loss {place.score:.4f}" if place.score is not None else f"  ({place.point.words})"


def _line(console: Console, title: str, text: str) -> None:
    console.print(f"{title:<12}{text}", highlight=False, soft_wrap=True, markup=False)
