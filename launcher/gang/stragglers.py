"""Which host do the others wait for? Told from the stall of each (launcher/training/stall.py). Knows no Ray and no clock."""

import itertools
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHARE = 0.2
"""Of a step: so much longer than the others a host must keep the devices waiting."""
STEADY = 5
"""So many times in a row."""


@dataclass(frozen=True)
class Straggler:
    host: str
    extra_s: float
    """Seconds that the others wait for it in each step."""
    step_s: float


@dataclass(frozen=True)
class _Sample:
    """All hosts' word on one step."""

    step: int
    time: float
    stalls: tuple[float, ...]


class Stragglers:
    """Of one attempt. Each host is told of once."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._open: dict[int, dict[int, float]] = {}
        """Step -> host -> its stall so far, where not all hosts have told of the step."""
        self._samples: deque[_Sample] = deque(maxlen=STEADY + 1)
        self._told: set[int] = set()

    def hear(self, index: int, event: Mapping[str, Any], now: float) -> Straggler | None:
        """What the process of host `index` said at `now`, in seconds; a host that turns out to be slow by that."""
        if event["event"] != "step" or "stall_s" not in event:
            return None
        step = event["step"]
        told = self._open.setdefault(step, {})
        told[index] = event["stall_s"]
        if len(told) < len(self._hosts):
            return None
        self._samples.append(_Sample(step, now, tuple(told[host] for host in range(len(self._hosts)))))
        self._open = {later: hosts for later, hosts in self._open.items() if later > step}
        return self._find()

    def _find(self) -> Straggler | None:
        if len(self._hosts) < 2 or len(self._samples) <= STEADY:
            return None
        for host in range(len(self._hosts)):
            extras = self._extras(host)
            if host not in self._told and all(extra > SHARE * step_s for extra, step_s in extras):
                self._told.add(host)
                return Straggler(self._hosts[host], *(statistics.fmean(values) for values in zip(*extras, strict=True)))
        return None

    def _extras(self, host: int) -> list[tuple[float, float]]:
        """For each pair of neighbouring samples: by how much a step of this host stalls longer than the others', and how long it takes."""
        found = []
        for before, after in itertools.pairwise(self._samples):
            steps = max(1, after.step - before.step)
            stalls = [(late - early) / steps for early, late in zip(before.stalls, after.stalls, strict=True)]
            others = statistics.median(stall for index, stall in enumerate(stalls) if index != host)
            found.append((stalls[host] - others, (after.time - before.time) / steps))
        return found
