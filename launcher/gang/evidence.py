"""From what all hosts say to one cause: which host failed first, why, and which budget pays for it.

A peer of the host that failed fails too, soon after, with an error of its own: a broken connection. The first cause wins over such echoes.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Cause(StrEnum):
    """Which budget a failure is charged to; the names are the keys of status.json's recoveries."""

    PREEMPTED = "preempted"
    """The cloud took a slice away, by preemption or for maintenance."""
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
    preempted: bool = False
    """There is evidence that the cloud took the host away."""
    sick: str = ""
    """What the process said that blames the machine and not the program; its slice has to be replaced."""

    @property
    def needs_new_hosts(self) -> bool:
        return self.code is None or self.preempted or bool(self.sick)

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


# What blames the machine and not the program (from marin-community/marin, iris/worker/tpu_health.py).
_SICK = (
    "Couldn't open iommu group",
    "open(/dev/vfio",
    "Failed to initialize TPU system",
    "TPU initialization failed",
    "No accelerator found",
)


def sickness(output: str) -> str:
    """The first line of a failed process's output that says its machine is sick; empty when there is none."""
    return next((line.strip()[:500] for line in output.splitlines() if any(text in line for text in _SICK)), "")


def classify(failures: Sequence[HostFailure]) -> tuple[HostFailure, Cause]:
    """The failure that counts, and its cause. `failures` is not empty.

    That of a sick machine if there is one (its peers fail with it), else the first that is no echo, else the first. When the cloud took a
    host away, what follows from it is charged to that.
    """
    ordered = sorted(failures, key=lambda failure: failure.time)
    first = next((failure for failure in ordered if not is_echo(failure)), ordered[0])
    first = next((failure for failure in ordered if failure.sick), first)
    if any(text in first.error for text in _OOM):
        return first, Cause.OOM
    if first.code is not None and first.code > 0 and not (first.sick or is_echo(first)):
        return first, Cause.APPLICATION
    taken = next((failure for failure in ordered if failure.preempted), None)
    return (first, Cause.INFRASTRUCTURE) if taken is None else (taken, Cause.PREEMPTED)
