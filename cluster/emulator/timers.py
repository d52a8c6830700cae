"""When the emulated cloud does what it has promised: at once by default, later where a profile says so."""

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Profile:
    """How long the emulated cloud takes, in seconds."""

    create: float = 0.0
    delete: float = 0.0


INSTANT = Profile()


class Timers(Protocol):
    def after(self, delay: float, action: Callable[[], None]) -> None:
        """Call `action` on some other thread, `delay` seconds from now."""

    def close(self) -> None:
        """Drop what has not begun and wait for what has."""


class ThreadTimers:
    """Real time, a few worker threads."""

    def __init__(self, workers: int = 8, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="emulator")
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()  # keeps actions of one moment in order, and the heap from comparing functions
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="emulator-timers")
        self._thread.start()

    def after(self, delay: float, action: Callable[[], None]) -> None:
        with self._changed:
            heapq.heappush(self._due, (self._clock() + delay, next(self._numbers), action))
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._due.clear()
            self._changed.notify()
        self._thread.join()
        self._pool.shutdown(wait=True)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._due or self._due[0][0] > self._clock()):
                    self._changed.wait(self._due[0][0] - self._clock() if self._due else None)
                if self._closed:
                    return
                action = heapq.heappop(self._due)[2]
            self._pool.submit(_logged, action)


def _logged(action: Callable[[], None]) -> None:
    """The outermost frame of a worker: an error that nobody foresaw is written down, and the service goes on."""
    try:
        action()
    except Exception:
        log.exception("the emulated cloud could not do its work")
