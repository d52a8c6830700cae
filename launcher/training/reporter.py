"""What a training process tells its supervisor: one JSON line an event, to an inherited file descriptor.

    phase                 {phase}       connecting data compiling restoring initializing evaluating training saving exporting
    data                  {parts, held_out}     of each source, and of what is held out: documents, tokens, rows, cut (longer than a row)
    step                  {step, total_steps, stall_s, loss, tokens_per_second, mfu, step_time}     nulls when the step was not logged; for
                          how many seconds the devices have waited for this host since the loop began (stall.py)
    checkpoint            {step, blocking_s, write_s}   committed, with its manifest; seconds that training stood still, seconds in all
    checkpoint_set_aside  {step, reason}
    restored              {step}
    evaluation            {when: before | during | after, step, loss, parts}   parts: loss by name, of a mixture's parts
    samples               {when: before | after, step, samples: [{prompt, text, tokens}]}
    profile, profile_failed                     launcher/training/profiling.py
    wandb_failed          {error}       launcher/training/tracking.py
    finished              {step, loss}
    error                 {error}       one line

Every event carries `time`, seconds since the epoch. `checkpoint` and `checkpoint_set_aside` come from process 0 only.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from launcher.process_variables import EVENT_FD

STEP_INTERVAL = 1.0
"""Seconds between two step events that carry no metrics: enough for a live display, and no load."""


class Reporter(Protocol):
    """Anything that takes events; `emit` may be called from any thread."""

    def emit(self, event: str, **values: Any) -> None: ...


class SilentReporter:
    """For training without a supervisor."""

    def emit(self, event: str, **values: Any) -> None:
        """Nobody listens."""


class PipeReporter:
    """Writes events to a file descriptor. A reader that went away is no reason to stop training."""

    def __init__(self, fd: int, clock: Callable[[], float] = time.time) -> None:
        self._fd, self._clock = fd, clock
        self._lock = threading.Lock()
        self._broken = False

    def emit(self, event: str, **values: Any) -> None:
        line = json.dumps({"event": event, **values, "time": self._clock()}, allow_nan=False).encode() + b"\n"
        with self._lock:
            self._write(line)

    def _write(self, line: bytes) -> None:
        while line and not self._broken:
            try:
                line = line[os.write(self._fd, line) :]
            except BrokenPipeError:
                self._broken = True


class StepThrottle:
    """Lets a step event through when it has metrics, is the first or the last, or enough time has passed."""

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.monotonic, interval: float = STEP_INTERVAL) -> None:
        self._total, self._clock, self._interval = total_steps, clock, interval
        self._last: float | None = None

    def passes(self, step: int, has_metrics: bool) -> bool:
        now = self._clock()
        due = self._last is None or now - self._last >= self._interval
        if due or has_metrics or step == self._total:
            self._last = now
            return True
        return False


def reporter_from_environment() -> Reporter:
    """The supervisor's, when it gave a descriptor; else a silent one."""
    given = os.environ.get(EVENT_FD)
    return PipeReporter(int(given)) if given else SilentReporter()
