"""Has this run been told to stop? Asked once a step, answered the same way on every process.

With several processes JAX's preemption service owns SIGTERM after `jax.distributed.initialize`: a SIGTERM on any process makes all of
them stop at the same step. With one process that service does not exist, and a handler of ours takes the signal.
"""

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Armed from its creation to `disarm`. Must be made in the main thread to see SIGTERM; elsewhere it is never set by a signal."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._several = jax.process_count() > 1
        self._ours = not self._several and threading.current_thread() is threading.main_thread()
        self._before = signal.signal(signal.SIGTERM, self._handle) if self._ours else None

    def reached(self, step: int) -> bool:
        """Whether to save and stop at this step boundary. Every process must ask for every step, in lockstep."""
        if self._several:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._asked.is_set()

    def ask(self) -> None:
        """Stop at the next step boundary, as SIGTERM would (one process only)."""
        self._asked.set()

    def disarm(self) -> None:
        """Give SIGTERM back. May be called again."""
        if self._ours:
            signal.signal(signal.SIGTERM, self._before)
            self._ours = False

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._asked.set()
