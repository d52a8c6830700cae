"""Whether the head of the cluster can be reached, and for how long it could not."""

import logging
import socket
from collections.abc import Callable

logger = logging.getLogger(__name__)

FAILURES = 3
"""So many tries in a row have to fail before the head counts as lost: one may fail on a busy machine, or right after a sleep."""


class HeadWatch:
    """Tries the head at most every `interval` seconds, whenever `tick` is called."""

    def __init__(self, reach: Callable[[], bool], clock: Callable[[], float], interval: float) -> None:
        """`clock`: monotonic seconds, so that a machine that slept does not count the time."""
        self._reach, self._clock, self._interval = reach, clock, interval
        self._tried = float("-inf")
        self._seen = clock()
        self._failed = 0

    def tick(self) -> None:
        now = self._clock()
        if now - self._tried < self._interval:
            return
        self._tried = now
        if self._reach():
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

    @property
    def lost_for(self) -> float:
        """Seconds since the head was last reached (at first: since the watch began); 0 while it counts as there."""
        return self._clock() - self._seen if self._failed >= FAILURES else 0.0


def accepts(address: str, timeout: float = 2.0) -> bool:
    """Whether somebody listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=timeout).close()
    except OSError:
        return False
    return True
