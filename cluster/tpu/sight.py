"""What the zones of a cluster hold, and what one that does not answer held when it last did.

A slice that is missing from a listing is taken for ended by whoever keeps a cluster going, and made again. So a zone that does not answer
keeps the slices it was last seen with; one that never was seen makes the listing fail.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.tpu.api import ALL_ZONES, TpuApi
from cluster.tpu.errors import TransientError
from cluster.tpu.slices import OWNER_LABEL, ClusterSlice, merge


@dataclass(frozen=True)
class View:
    """One look at all zones."""

    slices: list[ClusterSlice]
    """In the zones that answered: all of the cluster's."""
    hidden: frozenset[str]
    """The cluster's zones that did not answer."""

    def complete(self) -> list[ClusterSlice]:
        """Raises TransientError when a zone is hidden."""
        if self.hidden:
            raise TransientError(f"the listing lacks {', '.join(sorted(self.hidden))}", resource="slices")
        return self.slices


class Sight:
    """Looks at the zones of one cluster and remembers. Safe to use from several threads."""

    def __init__(self, api: TpuApi, cluster: str, zones: Sequence[str]) -> None:
        self._api, self._cluster, self._zones = api, cluster, zones
        self._lock = threading.Lock()
        self._last: dict[str, list[ClusterSlice]] = {}
        self._hidden: frozenset[str] = frozenset()

    @property
    def hidden(self) -> frozenset[str]:
        """The zones that did not answer at the last look."""
        with self._lock:
            return self._hidden

    def look(self) -> View:
        """Two paged calls whatever the number of zones. Raises TPUError when a page cannot be had."""
        place = self._zones[0] if len(self._zones) == 1 else ALL_ZONES
        queued = self._api.look_at_queued_resources(place)  # first: see lifecycle
        nodes = self._api.look_at_nodes(place)
        away = queued.unreachable | nodes.unreachable
        hidden = frozenset(zone for zone in self._zones if zone in away or None in away)
        ours = [
            item
            for item in merge(queued.items, nodes.items)
            if item.zone in self._zones and item.zone not in hidden and item.labels.get(OWNER_LABEL) == self._cluster
        ]
        with self._lock:
            self._hidden = hidden
        return View(ours, hidden)

    def remembered(self, hidden: Iterable[str]) -> list[ClusterSlice]:
        """What zones that do not answer held when they last did. Raises TransientError for one that was never seen."""
        with self._lock:
            unknown = [zone for zone in sorted(hidden) if zone not in self._last]
            if unknown:
                raise TransientError(f"the listing lacks {', '.join(unknown)}", resource=f"slices of {self._cluster}")
            return [item for zone in sorted(hidden) for item in self._last[zone]]

    def remember(self, slices: Iterable[ClusterSlice]) -> None:
        """What the zones that answered hold, as it was judged, and what the others held."""
        found: dict[str, list[ClusterSlice]] = {zone: [] for zone in self._zones}
        for item in slices:
            found[item.zone].append(item)
        with self._lock:
            self._last = found
