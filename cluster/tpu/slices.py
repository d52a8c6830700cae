"""A slice as we see it: its node and its queued resource put together, and how long it has been as it is."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.tpu import catalog
from cluster.tpu.errors import DeadlineExceededError, PreemptedError, StockoutError, TPUError, UnknownError
from cluster.tpu.lifecycle import (
    ACCEPTING_LIMIT_S,
    DELETING_LIMIT_S,
    INTERRUPTED_LIMIT_S,
    WAITS_FOR_CAPACITY,
    Life,
    Step,
    provisioning_limit,
    step,
)
from cluster.tpu.messages import QueuedResource, Slice

OWNER_LABEL = "podlaunch-cluster"
CREATOR_LABEL = "podlaunch-owner"
"""Which state directory (one user on one machine) made it: only that one can tell whether a cluster lives."""
VERSION_LABEL = "podlaunch-version"
TYPE_LABEL = "podlaunch-type"
ROLE_LABEL = "podlaunch-role"
"""What a resource other than a slice is to its cluster."""
HEAD_ROLE, SECRET_ROLE = "head", "secret"
_QUEUE_GRACE_S = 600.0
_PROVISIONING_LIMIT_S = 7200.0
"""From the grant to READY for a queued resource, as marin-community/marin has it."""


@dataclass(frozen=True)
class ClusterSlice:
    """One slice: its node, its queued resource, or both."""

    name: str
    zone: str
    node: Slice | None
    queued: QueuedResource | None
    given_up: bool = False
    """It has been in its state for longer than that can take, or there is one too many of it."""

    @functools.cached_property
    def step(self) -> Step:
        now = step(self.node.state if self.node else None, self.queued.state if self.queued else None)
        return step("STOPPED", None) if self.given_up and now.life not in (Life.DELETING, Life.GONE) else now

    @property
    def life(self) -> Life:
        return self.step.life

    @property
    def state(self) -> str:
        """As the API names it: the node's, or the queue's while there is no node or when it is the queue that ends the slice."""
        if self.node is None or (self.life is Life.LOST and self.queued is not None and self.queued.state in ("FAILED", "SUSPENDED")):
            return self.queued.state if self.queued is not None else "NOT_FOUND"
        return self.node.state

    @functools.cached_property
    def labels(self) -> Mapping[str, str]:
        return {**(self.queued.labels if self.queued else {}), **(self.node.labels if self.node else {})}

    @property
    def waits_for_capacity(self) -> bool:
        return self.node is None and self.queued is not None and self.queued.state in WAITS_FOR_CAPACITY

    @property
    def hosts(self) -> tuple[str, ...]:
        return self.node.hosts if self.node is not None else ()

    @property
    def accelerator_type(self) -> str:
        kinds = (part.accelerator_type for part in (self.node, self.queued) if part is not None)
        return next((kind for kind in kinds if kind), self.labels.get(TYPE_LABEL, ""))

    @property
    def created(self) -> float:
        """Seconds since the epoch."""
        return min(part.created for part in (self.node, self.queued) if part is not None)

    @property
    def health(self) -> str:
        return self.node.health if self.node is not None else "HEALTH_UNSPECIFIED"

    @property
    def usd_per_hour(self) -> float | None:
        """Estimated list price while it is billed; None when the catalogue has none."""
        kind = catalog.by_name().get(self.accelerator_type)
        spot = (self.node is not None and self.node.spot) or (self.queued is not None and self.queued.spot)
        price = None if kind is None else kind.usd_per_chip_hour_spot if spot else kind.usd_per_chip_hour
        return None if price is None or kind is None else price * kind.chips

    @property
    def failure(self) -> TPUError:
        """Why it is LOST, as far as the API tells."""
        error = self.queued.error if self.queued is not None else None
        if isinstance(error, DeadlineExceededError):
            return StockoutError(f"it waited for capacity until its time was over ({error.words})", resource=self.name, zone=self.zone)
        if error is not None:
            return error
        if self.given_up:
            return DeadlineExceededError(f"it has been {self.state} for too long", resource=self.name, zone=self.zone)
        taken = self.queued is not None and self.queued.state in ("SUSPENDING", "SUSPENDED")
        if taken or (self.node is not None and self.node.state == "PREEMPTED"):
            return PreemptedError(f"it became {self.state}", resource=self.name, zone=self.zone)
        return UnknownError(f"it became {self.state}", resource=self.name, zone=self.zone)


def merge(queued: Iterable[QueuedResource], nodes: Iterable[Slice]) -> list[ClusterSlice]:
    """Nodes and queued resources of the same zone and name put together. `queued` has to be the older listing: see lifecycle."""
    waiting = {(item.zone, item.name): item for item in queued}
    there = {(item.zone, item.name): item for item in nodes}
    keys = [*there, *(key for key in waiting if key not in there)]
    return [ClusterSlice(name, zone, there.get((zone, name)), waiting.get((zone, name))) for zone, name in keys]


def best_first(slices: Sequence[ClusterSlice]) -> list[ClusterSlice]:
    """Slices of one name, the one to keep first."""
    order = (Life.READY, Life.INTERRUPTED, Life.PENDING, Life.LOST, Life.DELETING, Life.GONE)
    return sorted(slices, key=lambda item: (order.index(item.life), item.created))


class Stopwatch:
    """How long each slice has been as it is, since the API does not say. Counts from the first look, so a new process starts anew."""

    def __init__(self, clock: Callable[[], float], valid_for_s: float) -> None:
        """`valid_for_s`: how long a queued resource may wait for capacity."""
        self._clock, self._valid_for = clock, valid_for_s
        self._since: dict[tuple[str, str], tuple[object, float]] = {}

    def judge(self, slices: Iterable[ClusterSlice], hidden: Collection[str] = ()) -> list[ClusterSlice]:
        """The same slices with `given_up` set. Takes a whole listing: what is not in it is forgotten, except in the zones `hidden`."""
        now = self._clock()
        before, self._since = self._since, {key: value for key, value in self._since.items() if key[0] in hidden}
        judged = []
        for item in slices:
            key = (item.zone, item.name)
            states = (item.node and item.node.state, item.queued and item.queued.state)
            same, since = before.get(key, (None, now))
            since = since if same == states else now
            self._since[key] = (states, since)
            judged.append(dataclasses.replace(item, given_up=now - since > self._limit(item)))
        return judged

    def _limit(self, item: ClusterSlice) -> float:
        if item.life is Life.DELETING:
            return DELETING_LIMIT_S
        if item.life is Life.INTERRUPTED:
            return INTERRUPTED_LIMIT_S
        if item.life is not Life.PENDING:
            return float("inf")
        if item.queued is None:
            kind = catalog.by_name().get(item.accelerator_type)
            return provisioning_limit(kind.hosts if kind is not None else 1)
        if item.node is None and item.queued.state == "CREATING":
            return ACCEPTING_LIMIT_S
        granted = item.node is not None or item.queued.state == "PROVISIONING"
        return _PROVISIONING_LIMIT_S if granted else self._valid_for + _QUEUE_GRACE_S
