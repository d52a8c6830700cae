"""From what all hosts say to one cause: which host failed first, why, and which budget pays for it.

A peer of the host that failed fails too, soon after, with an error of its own: a broken connection. The first cause wins over such echoes.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Cause(StrEnum):
    """Which budget a failure is charged to; the names are the keys of status.json's recoveries."""

    INFRASTRUCTURE = "infrastructure"
    OOM = "oom"
    APPLICATION = "application"


@dataclass(frozen=True)
class HostFailure:
    """How one host's process ended. `code` is None when the host itself was lost; negative is the signal that killed it."""

    host: str
    time: float
    code: int | None
    error: str

    @property
    def describe(self) -> str:
        if self.code is None:
            return self.error
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}" + (f" ({self.error})" if self.error else "")
        return self.error or f"ended with exit code {self.code}"


_OOM = ("RESOURCE_EXHAUSTED", "Out of memory", "MemoryError", "Cannot allocate memory")
# What a process says whose peer went away (gloo on CPU, JAX's coordination service, the TPU's own runtime).
_ECHOES = (
    "Gloo",
    "Connection closed by peer",
    "Connection reset by peer",
    "coordination service",
    "heartbeat",
    "UNAVAILABLE",
    "PollForError",
)


def is_echo(failure: HostFailure) -> bool:
    """Whether the process probably failed only because another one did."""
    return failure.code == -signal.SIGABRT or any(text in failure.error for text in _ECHOES)


def classify(failures: Sequence[HostFailure]) -> tuple[HostFailure, Cause]:
    """The first failure that is no echo (else the first), and its cause. `failures` is not empty."""
    ordered = sorted(failures, key=lambda failure: failure.time)
    first = next((failure for failure in ordered if not is_echo(failure)), ordered[0])
    if any(text in first.error for text in _OOM):
        return first, Cause.OOM
    if first.code is None or first.code < 0 or is_echo(first):
        return first, Cause.INFRASTRUCTURE
    return first, Cause.APPLICATION
