"""From what all hosts say to one cause: which host failed first, why, and which budget pays for it.

A peer of the host that failed fails too, soon after, with an error of its own: a broken connection. The first cause wins over such echoes.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Cause(StrEnum):
    """Which budget a failure is charged to; the names are the keys of status.json's recoveries and of run.budget."""

    PREEMPTED = "preempted"
    """The cloud took a slice away, by preemption or for maintenance."""
    INFRASTRUCTURE = "infrastructure"
    """A machine is sick, a host or the network is lost, a process was killed from outside."""
    OOM = "oom"
    """The host's memory or the device's was too small."""
    APPLICATION = "application"
    """The program itself."""


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
    """What blames the machine and not the program; its slice has to be replaced."""
    oom: str = ""
    """What says that the host's memory was used up."""

    @property
    def needs_new_hosts(self) -> bool:
        return self.code is None or self.preempted or bool(self.sick)

    @property
    def slice_name(self) -> str:
        """Of hosts `<slice>/<worker>`, and of a slice that stands for all its hosts."""
        return self.host.rpartition("/")[0] or self.host

    @property
    def describe(self) -> str:
        if self.code is None:
            return self.error
        if self.code < 0:
            words = "; ".join(text for text in (self.oom, self.error) if text)
            return f"killed by {signal.Signals(-self.code).name}" + (f" ({words})" if words else "")
        return self.error or f"ended with exit code {self.code}"


# Device memory (XLA's status code; "Ran out of memory in memory space hbm" when the compiler sees it), Python's and libc's words, and
# those of Ray's memory monitor when it ends a runner.
_OOM = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "MemoryError", "Cannot allocate memory", "std::bad_alloc", "low on memory")
# The same status code, for something else: TensorStore's full disk, quotas of Google's APIs, gRPC's limit of a message.
_NOT_MEMORY = ("No space left on device", "Disk quota exceeded", "uota exceeded", "message larger than max")
# What a process says whose peer went away (gloo on CPU, JAX's coordination service, the TPU's own runtime).
_ECHOES = (
    "Gloo",
    "Connection closed by peer",
    "Connection reset by peer",
    "coordination service",
    "CoordinationService",
    "heartbeat",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "PollForError",
)
# What gloo tells of a connection that it has made: the last words of a process that was killed, and no echo of another's end.
_NO_ERROR = "[Gloo] Rank "
# What a program says that loses the network, a name server or its storage.
_NETWORK = (
    "Network is unreachable",
    "No route to host",
    "Connection timed out",
    "Temporary failure in name resolution",
    "Name or service not known",
    "failed to connect to all addresses",
    "Connection refused",
    "Cannot connect to host",  # aiohttp's, by which gcsfs seals checkpoints
    "Server disconnected",
    "Couldn't connect to server",  # libcurl's, by which TensorStore writes them
    "the service stumbled",  # our own, of a service of Google's that stumbled for longer than we were patient (cluster/cloud_errors.py)
    "no answer in time",
)
# What blames the machine and not the program (from marin-community/marin, iris/worker/tpu_health.py).
_SICK = (
    "Couldn't open iommu group",
    "open(/dev/vfio",
    "Failed to initialize TPU system",
    "TPU initialization failed",
    "No accelerator found",
)
# Signals that a program brings upon itself; SIGKILL and SIGTERM come from outside.
_OWN_SIGNALS = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP})


def sickness(output: str) -> str:
    """The first line of a failed process's output that says its machine is sick; empty when there is none."""
    return next((line.strip()[:500] for line in output.splitlines() if _says(line, _SICK)), "")


def first_error(output: str) -> str:
    """What a failed process's output ends with: the error of its last traceback, else the last line that says something."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip() and not line.startswith(_NO_ERROR)]
    starts = [number for number, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    errors = [line for line in lines[starts[-1] + 1 :] if not line[0].isspace()] if starts else []
    return (errors or lines[-1:] or [""])[0].strip()[:500]


def is_echo(failure: HostFailure) -> bool:
    """Whether the process probably failed only because another one did. One that was killed did not, whatever it had said last."""
    if failure.code in (-signal.SIGKILL, -signal.SIGTERM):
        return False
    return failure.code == -signal.SIGABRT or _says(failure.error, _ECHOES)


def says_of_the_program(failure: HostFailure) -> bool:
    """Whether the failure tells something of the program, and not only of machines, so that the same one again is no accident."""
    if failure.code is None or failure.sick or _says(failure.error, _NETWORK):
        return False
    return failure.code > 0 or -failure.code in _OWN_SIGNALS


def cause_of(failure: HostFailure) -> Cause | None:
    """The cause of one host's failure taken by itself; None when it is only an echo of another host's."""
    if failure.preempted:
        return Cause.PREEMPTED
    if failure.sick:
        return Cause.INFRASTRUCTURE
    if failure.oom or (_says(failure.error, _OOM) and not _says(failure.error, _NOT_MEMORY)):
        return Cause.OOM
    if is_echo(failure):
        return None
    if failure.code is None or failure.code < 0 or _says(failure.error, _NETWORK):
        return Cause.INFRASTRUCTURE
    return Cause.APPLICATION


def classify(failures: Sequence[HostFailure]) -> tuple[HostFailure, Cause]:
    """The failure that counts, and its cause. `failures` is not empty.

    That of a sick machine if there is one (its peers fail with it), else the first that is no echo, else the first. When the cloud took a
    host away, a lost host and a broken connection are charged to that, whoever noticed first.
    """
    ordered = sorted(failures, key=lambda failure: failure.time)
    first = next((failure for failure in ordered if cause_of(failure) is not None), ordered[0])
    first = next((failure for failure in ordered if failure.sick and not failure.preempted), first)
    cause = cause_of(first) or Cause.INFRASTRUCTURE
    taken = next((failure for failure in ordered if failure.preempted), None)
    return (taken, Cause.PREEMPTED) if taken is not None and cause is Cause.INFRASTRUCTURE else (first, cause)


def _says(text: str, patterns: Sequence[str]) -> bool:
    return any(pattern in text for pattern in patterns)
