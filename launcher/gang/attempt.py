"""What the hosts of one attempt have said, and what that amounts to. Knows no Ray; the clock comes in."""

import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from launcher.gang.evidence import Cause, HostFailure, classify
from launcher.gang.states import Happening

EXIT_STOPPED = 143
"""The exit code of a training process that was asked to end and did (128 + SIGTERM)."""


_IS_STOPPED = re.compile(rf"process \d+ is ({psutil.STATUS_STOPPED}|{psutil.STATUS_ZOMBIE}|{psutil.STATUS_DISK_SLEEP})")


@dataclass
class Attempt:
    """Hosts are meant by their index in the gang; `hosts` are their names."""

    hosts: Sequence[str]
    clock: Callable[[], float]
    """Seconds since the epoch."""
    step: int | None = None
    """The newest step of this attempt that process 0 told of."""
    steps: dict[int, int] = field(default_factory=dict)
    """The newest step that each host's process told of."""
    ended: dict[int, int] = field(default_factory=dict)
    """Exit codes of the processes that ended well, or as they were asked to."""
    failed: set[int] = field(default_factory=set)
    evidence: list[HostFailure] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    """The first error that each process told of."""
    notices: list[HostFailure] = field(default_factory=list)
    """Hosts that the cloud announced to take away."""
    deadline: float = float("inf")
    """When the first of them ends."""

    def take(self, index: int, event: Mapping[str, Any]) -> Happening | None:
        """Keep what a host's runner said; what it amounts to, None for nothing."""
        match event["event"]:
            case "error":
                self.errors.setdefault(index, str(event["error"]))
            case "notice":
                words = f"the cloud announced: {event['kind']}"
                self.notices.append(HostFailure(self.hosts[index], event["time"], None, words, preempted=True))
                self.deadline = min(self.deadline, event["deadline"])
                return Happening.NOTICE
            case "lost" if index not in self.ended:
                lost = HostFailure(self.hosts[index], self.clock(), None, str(event["error"]), event.get("preempted", False))
                return self._fail(index, lost)
            case "exit" if event["code"] in (0, EXIT_STOPPED):
                self.ended[index] = event["code"]
                return self._all_ended()
            case "exit":
                return self._fail(index, self._failure(index, event))
            case "phase" if index == 0 and event["phase"] == "script":
                return Happening.PROGRAM
            case "step":
                self.steps[index] = event["step"]
                if index != 0:
                    return None
                first = self.step is None
                self.step = event["step"]
                return Happening.STEP if first else None
        return None

    def hang(self, stacks: Sequence[str | None], words: str) -> HostFailure:
        """The host of a gang that hangs which looks most as if the others waited for it. `stacks`: what stacks.py said of each host's
        process, None where the host does not answer.
        """
        silent = next((index for index, text in enumerate(stacks) if text is None), None)
        if silent is not None:
            return HostFailure(self.hosts[silent], self.clock(), None, f"{words}; the host does not answer")
        stopped = next((index for index, text in enumerate(stacks) if text is not None and _IS_STOPPED.match(text)), None)
        slowest = min(range(len(self.hosts)), key=lambda index: self.steps.get(index, 0))
        # Killed by us, and not by itself: that says nothing about the program.
        return HostFailure(self.hosts[slowest if stopped is None else stopped], self.clock(), -signal.SIGKILL, words)

    def blame(self, failure: HostFailure) -> None:
        """Add evidence that no process of the gang gave."""
        self.evidence.append(failure)

    def finding(self) -> tuple[HostFailure, Cause]:
        """The failure that counts and its cause, once the gang does not go on."""
        if not self.evidence and not self.notices:
            # Nobody of ours asked: the machine is being shut down, or somebody sent the signal by hand.
            stopped = next(index for index, code in self.ended.items() if code == EXIT_STOPPED)
            return HostFailure(self.hosts[stopped], self.clock(), -signal.SIGTERM, ""), Cause.INFRASTRUCTURE
        return classify(self.evidence + self.notices)

    @property
    def needs_new_hosts(self) -> bool:
        return any(failure.needs_new_hosts for failure in self.evidence + self.notices)

    @property
    def hosts_may_be_lost(self) -> bool:
        """One is, or all processes were killed at once, which is how a slice goes that takes its runners along a moment later."""
        killed = sum(failure.code == -signal.SIGKILL for failure in self.evidence)
        return killed == len(self.hosts) or any(failure.code is None for failure in self.evidence)

    @property
    def blamed_slices(self) -> list[str]:
        """Those that have to be replaced, and not only given back."""
        return sorted({failure.slice_name for failure in self.evidence if failure.sick})

    def blame_of(self, slice_name: str) -> str:
        """Why that one has to be replaced, in words."""
        blamed = next(failure for failure in self.evidence if failure.sick and failure.slice_name == slice_name)
        return blamed.sick if blamed.host == slice_name else f"its host {blamed.host} is sick: {blamed.sick}"

    def _failure(self, index: int, event: Mapping[str, Any]) -> HostFailure:
        error = self.errors.get(index) or event["last_line"]
        return HostFailure(self.hosts[index], event["time"], event["code"], error, sick=event.get("sick", ""), oom=event.get("oom", ""))

    def _fail(self, index: int, failure: HostFailure) -> Happening:
        self.failed.add(index)
        self.blame(failure)
        return self._all_ended() or Happening.FAILURE

    def _all_ended(self) -> Happening | None:
        if len(self.ended) + len(self.failed) < len(self.hosts):
            return None
        if self.failed:
            return Happening.GONE
        return Happening.YIELDED if EXIT_STOPPED in self.ended.values() else Happening.FINISHED
