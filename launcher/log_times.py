"""When the lines of a log were written, which the lines themselves do not say.

Beside `host-<i>.log` the host keeps `host-<i>.times`: while the log grows, one line a second, `<seconds since the epoch> <its bytes then>`.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

INTERVAL_S = 1.0
"""Between two looks at a log: how exact the times are."""


class LogTimes:
    """Of one log, written by the host that has it."""

    def __init__(self, log: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        """`log`: None while there is none to look at. `clock`: seconds since the epoch."""
        self._log, self._clock = log, clock
        self._length = 0

    def look(self) -> None:
        """Note the log's length if it has grown. A full disk costs the note, not the run."""
        if self._log is None:
            return
        with contextlib.suppress(OSError):
            if (length := self._log.stat().st_size) > self._length:
                with times_of(self._log).open("a") as notes:
                    notes.write(f"{self._clock():.3f} {length}\n")
                self._length = length


def times_of(log: Path) -> Path:
    """The file beside it."""
    return log.with_suffix(".times")


def written_before(notes: bytes, moment: float) -> int:
    """So many bytes of a log were there at `moment`, seconds since the epoch; 0 where nobody noted it."""
    before = 0
    for line in notes.decode(errors="replace").splitlines(keepends=True):
        noted, _, length = line.partition(" ")
        if not line.endswith("\n") or not noted or float(noted) > moment:  # a line that was torn has no end
            break
        before = int(length)
    return before
