"""Creations under way: what became of them is learned from later listings, since no creation is waited for."""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.tpu.api import TpuApi
from cluster.tpu.errors import NotFoundError, TPUError, UnknownError
from cluster.tpu.lifecycle import BILLED, Life
from cluster.tpu.slices import ClusterSlice
from cluster.tpu.zones import ZonePolicy

_MISSES = 2
Key = tuple[str, str]
"""Zone and name."""


@dataclass(frozen=True)
class Creation:
    """A slice that was asked for and whose end is not known yet."""

    operation: str | None
    misses: int = 0
    """How many listings have lacked it although its operation tells nothing."""


class Creations:
    """What this process has asked for. Tells `policy` how it ended. Safe to use from several threads."""

    def __init__(self, api: TpuApi, policy: ZonePolicy, kind: str) -> None:
        self._api, self._policy, self._kind = api, policy, kind
        self._lock = threading.Lock()
        self._under_way: dict[Key, Creation] = {}

    def begin(self, zone: str, name: str, operation: str | None = None) -> None:
        with self._lock:
            self._under_way[zone, name] = Creation(operation)

    def end(self, key: Key, refusal: TPUError | None = None) -> None:
        """It is over; with `refusal`, the zone has not made it."""
        with self._lock:
            self._under_way.pop(key, None)
        if refusal is not None:
            self._policy.refused(self._kind, key[0], refusal)

    def under_way(self) -> dict[Key, Creation]:
        with self._lock:
            return dict(self._under_way)

    def learn(self, asked: Mapping[Key, Creation], slices: Iterable[ClusterSlice]) -> set[Key]:
        """What became of `asked`, by a listing that is younger; returns those whose operation has failed while their node is still there.

        Raises TPUError when an operation cannot be looked at.
        """
        listed = {(item.zone, item.name): item for item in slices}
        failed = {key for key, creation in asked.items() if self._has_failed(key, creation, listed.get(key))}
        for key, item in listed.items():
            if key not in asked and item.queued is not None and item.queued.state == "FAILED":  # asked for by an earlier process
                self._policy.refused(self._kind, item.zone, item.failure)
        return failed

    def _has_failed(self, key: Key, creation: Creation, item: ClusterSlice | None) -> bool:
        if item is not None and item.life in BILLED:
            self._policy.served(self._kind, key[0])
            self.end(key)
        elif item is not None and item.life is Life.LOST:
            self.end(key, item.failure)
        elif item is not None and item.life is Life.DELETING:
            self.end(key)
        elif item is None or item.queued is None:  # a queued resource tells its end by its own state, a plain node by its operation
            return self._operation_failed(key, creation, missing=item is None)
        return False

    def _operation_failed(self, key: Key, creation: Creation, *, missing: bool) -> bool:
        zone, name = key
        done, error = True, None
        if creation.operation is not None:
            try:
                operation = self._api.get_operation(creation.operation, resource=name, zone=zone)
                done, error = operation.done, operation.error
            except NotFoundError:
                pass  # the service forgets operations; the slice's own state tells
        if error is None and done and missing:
            if creation.misses + 1 >= _MISSES:
                error = UnknownError("it was accepted and is not there", resource=name, zone=zone)
            with self._lock:
                self._under_way[key] = Creation(None, creation.misses + 1)
        if error is not None:
            self.end(key, error)
        return error is not None
