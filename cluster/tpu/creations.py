"""Creations under way: what became of them is learned from later listings, since no creation is waited for."""

import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from cluster.tpu.api import TpuApi
from cluster.tpu.errors import NotFoundError, TPUError, UnknownError
from cluster.tpu.lifecycle import BILLED, Life
from cluster.tpu.slices import ClusterSlice
from cluster.tpu.zones import ZonePolicy

_MISSES = 2
_LONGEST_PAUSE_S = 60.0
"""Between two looks at an operation whose node is there. The pauses double from one second, so that many slices do not cost many calls."""
Key = tuple[str, str]
"""Zone and name."""


@dataclass(frozen=True)
class Creation:
    """A slice that was asked for and whose end is not known yet."""

    operation: str | None
    misses: int = 0
    """How many listings have lacked it although its operation tells nothing."""
    next_look: float = float("-inf")
    """When its operation is looked at again while the node is there and says nothing itself."""
    pause: float = 1.0


class Creations:
    """What this process has asked for. Tells `policy` how it ended. Safe to use from several threads."""

    def __init__(self, api: TpuApi, policy: ZonePolicy, kind: str, clock: Callable[[], float]) -> None:
        """`clock`: seconds."""
        self._api, self._policy, self._kind, self._clock = api, policy, kind, clock
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
        # What an earlier process had asked for is not learned from: when it failed is not told, and may be long ago.
        return {key for key, creation in asked.items() if self._has_failed(key, creation, listed.get(key))}

    def _has_failed(self, key: Key, creation: Creation, item: ClusterSlice | None) -> bool:
        if item is not None and item.life in BILLED:
            self._policy.served(self._kind, key[0])
            self.end(key)
        elif item is not None and item.life is Life.LOST:
            self.end(key, item.failure)
        elif item is None:
            self._find_out(key, creation)
        elif item.life is Life.DELETING:  # the service takes back what it could not make: its operation says why
            self.end(key, None if item.queued is not None else self._look(key, creation)[1])
        elif item.queued is None and self._clock() >= creation.next_look:
            # A plain node may outlive the failure of its operation; a queued resource tells its end by its own state.
            error = self._look(key, creation)[1]
            if error is not None:
                self.end(key, error)
                return True
            pause = min(creation.pause * 2, _LONGEST_PAUSE_S)
            self._keep(key, dataclasses.replace(creation, next_look=self._clock() + creation.pause, pause=pause))
        return False

    def _find_out(self, key: Key, creation: Creation) -> None:
        """What became of one that is not listed."""
        done, error = self._look(key, creation)
        if error is None and done:
            misses = creation.misses + 1
            if misses >= _MISSES:
                error = UnknownError("it was accepted and is not there", resource=key[1], zone=key[0])
            self._keep(key, Creation(None, misses))
        if error is not None:
            self.end(key, error)

    def _look(self, key: Key, creation: Creation) -> tuple[bool, TPUError | None]:
        """Whether the operation is over, and why it failed. Raises TPUError."""
        if creation.operation is None:
            return True, None
        try:
            operation = self._api.get_operation(creation.operation, resource=key[1], zone=key[0])
        except NotFoundError:
            return True, None  # the service forgets operations; the slice's own state tells
        return operation.done, operation.error

    def _keep(self, key: Key, creation: Creation) -> None:
        with self._lock:
            if key in self._under_way:
                self._under_way[key] = creation
