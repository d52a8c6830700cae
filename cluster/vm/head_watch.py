"""Whether the head of the cluster can be reached, for how long it could not, and whether it is another one than before."""

import logging
import socket
from collections.abc import Callable
from enum import Enum, auto

logger = logging.getLogger(__name__)

FAILURES = 3
"""So many tries in a row have to fail before the head counts as lost: one may fail on a busy machine, or right after a sleep."""


class Answer(Enum):
    """What becomes of a try to connect to Ray's head."""

    THERE = auto()
    REFUSED = auto()
    """Its machine answers that nobody listens: that Ray has ended, and whoever listens next knows nothing of what it knew."""
    SILENT = auto()
    """The head, or the way to it, is away."""


class HeadWatch:
    """Tries the head at most every `interval` seconds, whenever `tick` is called."""

    def __init__(self, reach: Callable[[], Answer], clock: Callable[[], float], interval: float) -> None:
        """`clock`: monotonic seconds, so that a machine that slept does not count the time."""
        self._reach, self._clock, self._interval = reach, clock, interval
        self._tried = float("-inf")
        self._seen = clock()
        self._failed = 0
        self._refused = float("-inf")

    def tick(self) -> None:
        now = self._clock()
        if now - self._tried < self._interval:
            return
        self._tried = now
        answer = self._reach()
        if answer is Answer.REFUSED:
            self._refused = now
        if answer is Answer.THERE:
            if self._failed:
                logger.info("the head can be reached")
            self._failed, self._seen = 0, now
            return
        self._failed += 1
        if self._failed == 1:
            logger.warning("the head cannot be reached")

    @property
    def reachable(self) -> bool:
        """As far as the last try tells."""
        return self._failed == 0 and self._tried > float("-inf")

    def ended_since(self, moment: float) -> bool:
        """Whether the Ray that was the head at that moment, by the clock, is known to have ended."""
        return self._refused > moment

    @property
    def lost_for(self) -> float:
        """Seconds since the head was last reached (at first: since the watch began); 0 while it counts as there."""
        return self._clock() - self._seen if self._failed >= FAILURES else 0.0


def reach(address: str, timeout: float = 2.0) -> Answer:
    """Try host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=timeout).close()
    except ConnectionRefusedError:
        return Answer.REFUSED
    except OSError:
        return Answer.SILENT
    return Answer.THERE


def accepts(address: str, timeout: float = 2.0) -> bool:
    """Whether somebody listens at host:port."""
    return reach(address, timeout) is Answer.THERE
