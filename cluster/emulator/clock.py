"""Time in the emulated cloud: whatever it has promised for later runs on a clock that can be moved on.

RealClock follows the machine's time and works on threads of its own; ManualClock stands still until `advance`, which does what has become
due on the caller's thread. Both are moved on by `advance`, so that a day in the emulated cloud takes no day.
"""

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

log = logging.getLogger(__name__)
Action = Callable[[], None]


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since the epoch."""

    def after(self, delay: float, action: Action) -> None:
        """Call `action` `delay` seconds from now, never on this thread's stack."""

    def sleep(self, seconds: float) -> None:
        """Hold this thread up for `seconds`, or until `close`."""

    def advance(self, seconds: float) -> None:
        """Move on by `seconds`: what is due by then is done in its order."""

    def close(self) -> None:
        """Drop what has not begun and wait for what has."""


class _Due:
    """Actions by the time they are due; those of one moment in the order they came."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Action]] = []
        self._numbers = itertools.count()  # keeps the heap from comparing functions

    def add(self, when: float, action: Action) -> None:
        heapq.heappush(self._heap, (when, next(self._numbers), action))

    def next(self) -> float | None:
        return self._heap[0][0] if self._heap else None

    def pop(self) -> Action:
        return heapq.heappop(self._heap)[2]

    def clear(self) -> None:
        self._heap.clear()


class RealClock:
    """The machine's time plus what it was advanced by; a few worker threads."""

    def __init__(self, workers: int = 8, clock: Callable[[], float] = time.monotonic, epoch: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._offset = epoch() - clock()  # monotonic beneath: a machine whose time is set back must not undo what has happened
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="emulator")
        self._due = _Due()
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="emulator-clock")
        self._thread.start()

    def now(self) -> float:
        return self._clock() + self._offset

    def after(self, delay: float, action: Action) -> None:
        with self._changed:
            self._due.add(self.now() + delay, action)
            self._changed.notify_all()

    def sleep(self, seconds: float) -> None:
        until = self.now() + seconds
        with self._changed:
            while (left := until - self.now()) > 0 and not self._closed.is_set():
                self._changed.wait(left)

    def advance(self, seconds: float) -> None:
        with self._changed:
            self._offset += seconds
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed.set()
            self._due.clear()
            self._changed.notify_all()
        self._thread.join()
        self._pool.shutdown(wait=True)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed.is_set() and ((when := self._due.next()) is None or when > self.now()):
                    self._changed.wait(None if when is None else when - self.now())
                if self._closed.is_set():
                    return
                action = self._due.pop()
            self._pool.submit(_logged, action)


class ManualClock:
    """Stands still until it is advanced. For tests: nothing happens on its own, and nothing waits."""

    def __init__(self, start: float = 1_000_000.0) -> None:
        """`start`: seconds since the epoch."""
        self._now = start
        self._due = _Due()
        self._changed = threading.Condition()
        self._closed = False

    def now(self) -> float:
        return self._now

    def after(self, delay: float, action: Action) -> None:
        with self._changed:
            self._due.add(self._now + delay, action)

    def sleep(self, seconds: float) -> None:
        with self._changed:
            until = self._now + seconds
            self._changed.wait_for(lambda: self._closed or self._now >= until)

    def advance(self, seconds: float = 0.0) -> None:
        """An action that raises ends it: in a test nothing may go wrong unseen."""
        until = self._now + seconds
        while (action := self._take(until)) is not None:
            action()
        with self._changed:
            self._now = until
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._due.clear()
            self._changed.notify_all()

    def _take(self, until: float) -> Action | None:
        with self._changed:
            when = self._due.next()
            if when is None or when > until:
                return None
            self._now = max(self._now, when)
            self._changed.notify_all()
            return self._due.pop()


def _logged(action: Action) -> None:
    """The outermost frame of a worker: an error that nobody foresaw is written down, and the service goes on."""
    try:
        action()
    except Exception:
        log.exception("the emulated cloud could not do its work")
