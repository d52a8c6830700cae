"""Whether every host of every READY slice lives for Ray.

The API goes on to say READY while a host is dead, hangs, or never comes up, and Ray looks after worker 0 only. So the hosts that a slice
should have are compared with Ray's node table; a slice that lacks one for longer than its grace is sick.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from cluster.durations import short_duration
from cluster.ray_nodes import SliceHosts
from cluster.tpu import catalog
from cluster.tpu.lifecycle import Life
from cluster.tpu.slices import ClusterSlice


@dataclass(frozen=True)
class _Seen:
    """One READY slice."""

    ready_since: float
    """When it was READY first, for this process."""
    joined: bool = False
    """All its hosts have been there at once."""
    missing_since: float | None = None


class HostWatch:
    """Judges the slices of one cluster, one listing after the other."""

    def __init__(self, clock: Callable[[], float], boot_grace_s: float, host_grace_s: float) -> None:
        """`clock`: seconds. `boot_grace_s`: from READY until all hosts have joined, for a slice of less than 64 hosts. `host_grace_s`: how
        long a host that was there may be away.
        """
        self._clock, self._boot_grace, self._host_grace = clock, boot_grace_s, host_grace_s
        self._seen: dict[str, _Seen] = {}

    def sick(self, slices: Iterable[ClusterSlice], hosts: Mapping[str, SliceHosts] | None) -> dict[str, str]:
        """Which of `slices` have lacked hosts for too long, and why, by name. `hosts` None: Ray does not tell, so none is judged now."""
        now = self._clock()
        ready = {item.name: item for item in slices if item.life is Life.READY}
        self._seen = {name: self._seen.get(name, _Seen(now)) for name in ready}
        if hosts is None:
            # Time in which Ray could not be asked is nobody's fault.
            self._seen = {name: _Seen(now, seen.joined, None) for name, seen in self._seen.items()}
            return {}
        found = {}
        for name, item in ready.items():
            reason = self._judge(name, _size(item), set(hosts[name].alive) if name in hosts else set(), now)
            if reason is not None:
                found[name] = reason
        return found

    def missing(self, name: str) -> bool:
        """Whether hosts of a slice that had joined were away when it was looked at last."""
        seen = self._seen.get(name)
        return seen is not None and seen.missing_since is not None

    def _judge(self, name: str, size: int, alive: set[int], now: float) -> str | None:
        seen, missing = self._seen[name], sorted(set(range(size)) - alive)
        if not missing:
            self._seen[name] = _Seen(seen.ready_since, joined=True)
            return None
        if not seen.joined:
            limit = boot_limit(self._boot_grace, size)
            late = now - seen.ready_since > limit
            return f"{_hosts(missing, size)} did not join within {short_duration(limit)}" if late else None
        since = seen.missing_since if seen.missing_since is not None else now
        self._seen[name] = _Seen(seen.ready_since, joined=True, missing_since=since)
        return f"{_hosts(missing, size)} is gone for {short_duration(now - since)}" if now - since > self._host_grace else None


def boot_limit(grace_s: float, hosts: int) -> float:
    """Twice as long from 64 hosts on, three times from 256: what marin-community/marin came to use for the boot of slices."""
    return grace_s * (1.0 if hosts < 64 else 2.0 if hosts < 256 else 3.0)


def _size(item: ClusterSlice) -> int:
    kind = catalog.by_name().get(item.accelerator_type)
    return kind.hosts if kind is not None else len(item.hosts)


def _hosts(missing: list[int], size: int) -> str:
    return f"host {missing[0]} of {size}" if len(missing) == 1 else f"{len(missing)} of {size} hosts"
