"""For how long the devices had nothing to do because this host had not given them their next step yet.

A step starts when the one before it is done on all devices and this host has dispatched it, batch included. What the host does while the
devices are busy costs nothing; what lies between the end of one step and the dispatch of the next is stall. The end of a step is the same
moment on all hosts, since its collectives wait for each other: so a host whose stall is steadily longer is the one that the others wait
for.
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any


class StepClock:
    """Knows when the newest step was done: it is told, or asks in a thread of its own, so that the loop never waits for the devices."""

    def __init__(self, wait_for: Callable[[Any], object] | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`wait_for` returns when what it was given is computed, such as `jax.block_until_ready`; None when the loop waits itself and
        calls `done`.
        """
        self._wait_for, self._clock = wait_for, clock
        self._given: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = 0
        self._done_at = clock()
        if wait_for is not None:
            threading.Thread(target=self._follow, args=(wait_for,), name="step-clock", daemon=True).start()

    def dispatched(self, result: Any) -> None:
        """A step is under way; `result` is there when it is done. Steps are done in the order in which they are dispatched."""
        with self._lock:
            self._open += 1
        if self._wait_for is not None:
            self._given.put(result)

    def done(self) -> None:
        """The oldest step that was under way is done."""
        with self._lock:
            self._open -= 1
            self._done_at = self._clock()

    def idle_since(self) -> float | None:
        """When the devices had done all they were given; None while they are busy."""
        with self._lock:
            return None if self._open else self._done_at

    def close(self) -> None:
        self._given.put(None)

    def _follow(self, wait_for: Callable[[Any], object]) -> None:
        while (result := self._given.get()) is not None:
            try:
                wait_for(result)
            except Exception:  # noqa: BLE001  # whatever went wrong on the devices is the loop's to meet and to tell
                return
            self.done()


class Stall:
    """Adds up the stall of this host: `seconds` since the loop began."""

    def __init__(self, steps: StepClock, clock: Callable[[], float] = time.monotonic) -> None:
        self._steps, self._clock = steps, clock
        self.seconds = 0.0
        self._free_from = clock()

    def resume(self) -> None:
        """What came before is no stall: the loop did something else, such as saving."""
        self._free_from = self._clock()

    def dispatching(self) -> None:
        """The next step is ready to be dispatched."""
        idle = self._steps.idle_since()
        if idle is not None:
            self.seconds += max(0.0, self._clock() - max(idle, self._free_from))
