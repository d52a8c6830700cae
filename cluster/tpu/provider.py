"""TPUProvider: the slices of one cluster, made, listed and deleted.

`create_slices`, `delete_slice`, `list_slices` and `sweep` ask and return; whoever keeps a cluster going (Ray's node provider) builds on
them. `start`, `stop` and `get_status` wait and are for whoever wants slices without Ray.

A slice is one queued resource with one node of the same name, or a plain node. What is refused, at once or later, is kept in a ZonePolicy,
which decides where the next slice is asked for.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from cluster.config import TPUConfig
from cluster.errors import ConfigError
from cluster.tpu.api import ALL_ZONES, TpuApi
from cluster.tpu.bringup import Bringup
from cluster.tpu.creations import Creations
from cluster.tpu.errors import (
    REFUSALS,
    AlreadyExistsError,
    DeadlineExceededError,
    NotFoundError,
    RateLimitedError,
    TPUError,
    TransientError,
)
from cluster.tpu.lifecycle import Action, Life, provisioning_limit
from cluster.tpu.owner import owner_id
from cluster.tpu.requests import node_request, owner_labels, queued_request, slice_names
from cluster.tpu.sight import Sight, View
from cluster.tpu.slices import (
    OWNER_LABEL,
    TYPE_LABEL,
    ClusterSlice,
    Stopwatch,
    best_first,
    merge,
)
from cluster.tpu.status import SliceStatus, TPUStatus, slice_status
from cluster.tpu.teardown import Teardown
from cluster.tpu.zones import TokenBucket, ZonePolicy

__all__ = ["OWNER_LABEL", "CreatedSlice", "SliceStatus", "TPUProvider", "TPUStatus"]
log = logging.getLogger(__name__)
S = TypeVar("S")
R = TypeVar("R")


@dataclass(frozen=True)
class CreatedSlice:
    """A slice that was asked for."""

    name: str
    zone: str
    operation: str | None
    """None when the operation's name was lost, or for an adopted slice; the slice's own state tells then."""
    adopted: bool = False
    """It was there already and is ours."""


class TPUProvider:
    """The slices of the cluster `config.name`. Safe to use from several threads."""

    def __init__(
        self,
        config: TPUConfig,
        api: TpuApi,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        policy: ZonePolicy | None = None,
        bucket: TokenBucket | None = None,
        owner: str = "",
        at_once: int = 16,
    ) -> None:
        """`clock`: seconds since the epoch. `owner`: who makes them, as `owner_id` tells. `at_once`: creations under way together.

        Raises ConfigError when project or zones are missing.
        """
        if api.project != config.effective_project:
            raise ConfigError(f"project {config.effective_project!r}: the connection is to project {api.project!r}")
        self.config, self.api = config, api
        self.zones = config.effective_zones
        self.kind = config.accelerator.name + ("" if config.provisioning == "on-demand" else f"-{config.provisioning}")
        self.policy = policy if policy is not None else ZonePolicy(clock)
        self._bucket = bucket if bucket is not None else TokenBucket(clock)
        self._clock, self._sleep, self._owner, self._at_once = clock, sleep, owner, at_once
        self._labels = owner_labels(config, owner)
        self._creations = Creations(api, self.policy, self.kind, clock)
        self._sight = Sight(api, config.name, self.zones)
        self._stopwatch = Stopwatch(clock, config.valid_until_seconds)

    @classmethod
    def connect(cls, config: TPUConfig, *, patience: float = 60.0, owner: str | None = None) -> "TPUProvider":
        """With a connection of its own, to where `config` says. `patience`: as for TpuApi. `owner`: None for this state directory's; a head
        VM makes slices for somebody else's. Raises as the constructor and TpuApi do.
        """
        api = TpuApi(config.endpoint, config.effective_project, patience=patience)
        return cls(config, api, owner=owner_id() if owner is None else owner)

    def sibling(self, config: TPUConfig) -> "TPUProvider":
        """For another kind of slices of the same cluster: over the same connection, within the same rate, told of the same refusals."""
        return TPUProvider(
            config,
            self.api,
            clock=self._clock,
            sleep=self._sleep,
            policy=self.policy,
            bucket=self._bucket,
            owner=self._owner,
            at_once=self._at_once,
        )

    def create_slice(
        self, slice_id: str, *, labels: Mapping[str, str] | None = None, metadata: Mapping[str, str] | None = None, zone: str | None = None
    ) -> CreatedSlice:
        """Ask for a slice in `zone`, or in the first open zone that does not refuse. Does not wait: what is refused later is learned by
        `sweep`. A slice of that name that is ours is adopted.

        Raises TPUError: why no zone took the request, AlreadyExistsError when the name is somebody else's, RateLimitedError when it is too
        early to ask.
        """
        (made,) = self.create_slices([slice_id], labels=labels, metadata=metadata, zone=zone)
        if isinstance(made, TPUError):
            raise made
        return made

    def create_slices(
        self,
        names: Sequence[str],
        *,
        labels: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        zone: str | None = None,
    ) -> list[CreatedSlice | TPUError]:
        """`create_slice` for several slices at once; what became of each, in their order."""

        def create(name: str) -> CreatedSlice | TPUError:
            try:
                return self._create(name, labels or {}, metadata or {}, zone)
            except TPUError as error:
                return error

        return self._together(create, names)

    def delete_slice(self, name: str, zone: str | None = None) -> bool:
        """Ask for a slice's end, in `zone` or wherever it is. Does not wait. False: there is no such slice. Raises TPUError."""
        found = False
        for candidate in [zone] if zone is not None else self.zones:
            found |= self._gone(self.api.delete_queued_resource, candidate, name) or self._gone(self.api.delete_node, candidate, name)
        return found

    def delete(self, item: ClusterSlice) -> None:
        """Ask for the end of a slice as it was listed. Does not wait. Raises TPUError."""
        self._gone(self.api.delete_queued_resource if item.queued is not None else self.api.delete_node, item.zone, item.name)

    def delete_all(self, items: Sequence[ClusterSlice]) -> list[TPUError]:
        """`delete` for several slices at once; what went wrong."""

        def delete(item: ClusterSlice) -> TPUError | None:
            try:
                self.delete(item)
            except TPUError as error:
                return error
            return None

        return [error for error in self._together(delete, items) if error is not None]

    def list_slices(self, labels: Mapping[str, str] | None = None) -> list[ClusterSlice]:
        """The cluster's slices that carry `labels`, in every state. Complete over all zones, or a TPUError."""
        found = self._sight.look().complete()
        return [item for item in found if not labels or labels.items() <= item.labels.items()]

    def look(self) -> View:
        """The cluster's slices as far as its zones answer. Raises TPUError."""
        return self._sight.look()

    def unseen(self) -> set[str]:
        """The slices that were asked for in zones which do not answer, so that they may be there without being listed."""
        hidden = self._sight.hidden
        return {name for zone, name in self._creations.under_way() if zone in hidden}

    def existing_slices(self) -> list[ClusterSlice]:
        """The slices made elsewhere that the configuration names, as far as they are there. Nothing here deletes them. Raises TPUError."""
        if not self.config.adopted:
            return []
        place = self.zones[0] if len(self.zones) == 1 else ALL_ZONES
        found = [node for node in self.api.list_nodes(place, self.zones) if node.name in self.config.adopted and node.zone in self.zones]
        return merge([], found)

    def sweep(self, view: View | None = None) -> list[ClusterSlice]:
        """All slices, and what follows from it: late refusals are learned; deleted is what is left of lost slices, of slices with the same
        name in several zones all but one, and what waits too long in a zone while another is open. `view`: what a look has found that was
        taken for several kinds of slices at once, of which these are one.

        A zone that does not answer keeps the slices it was last seen with. Raises TPUError when the listing fails, or lacks a zone that was
        never seen; a deletion that fails is logged and comes again.
        """
        asked = self._creations.under_way()  # before the listing, which may lack what is asked for meanwhile
        if view is None:
            view = self._sight.look()
        else:
            self._sight.see(view)
        unseen = self._sight.remembered(view.hidden)
        slices = self._stopwatch.judge(view.slices, view.hidden)
        failed = self._creations.learn({key: made for key, made in asked.items() if key[0] not in view.hidden}, slices)
        doomed = [item for item in slices if self._is_leftover(item) or (item.zone, item.name) in failed]
        doomed += _surplus([item for item in slices if item not in doomed])
        moved = [item for item in slices if item not in doomed and self._waits_in_vain(item, view.hidden)]
        gone = {id(item) for item in doomed}
        for item in [*doomed, *moved]:
            log.info("deleting %s in %s, which is %s", item.name, item.zone, item.state)
            try:
                self.delete(item)
                gone.add(id(item))
            except TPUError as error:
                log.warning("left for the next time: %s", error)
        swept = [dataclasses.replace(item, given_up=True) if id(item) in gone else item for item in slices] + unseen
        self._sight.remember(swept)
        return swept

    def start(
        self,
        *,
        labels: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        timeout: float | None = None,
        poll: float = 1.0,
        progress: Callable[[str], None] = lambda _: None,
        before_asking: Callable[[], None] = lambda: None,
    ) -> TPUStatus:
        """Bring up slices `<name>-0` .. `<name>-<slices-1>` and wait until they are READY. What is there already is kept.

        `timeout`: seconds, None for a limit by size and by the queue's. `progress` hears of every change, `before_asking` is
        called before each request that creates something. When it fails, what this call has created is deleted again, so that no slice
        bills for nobody. Raises TPUError: why no zone is left, AlreadyExistsError when a name is
        taken by a slice that is not ours, DeadlineExceededError.
        """
        limit = provisioning_limit(self.config.slices * self.config.hosts_per_slice)
        limit += self.config.valid_until_seconds if self.config.queued_resource else 0.0
        deadline = self._clock() + (timeout if timeout is not None else limit)
        bringup = Bringup(self, slice_names(self.config), labels or {}, metadata or {}, progress, before_asking)
        try:
            while not bringup.step():
                if self._clock() > deadline:
                    raise DeadlineExceededError(f"not READY in time: {bringup.waiting()}", resource=f"slices of {self.config.name}")
                self._sleep(poll)
        except BaseException:  # an interrupt as well: whatever ends the wait must not leave slices that bill
            bringup.undo()
            raise
        return self._status(bringup.slices)  # not one more look, which could fail and leave slices that nobody has been told of

    def stop(self, *, timeout: float = 600.0, poll: float = 1.0) -> int:
        """Delete all slices of the cluster and wait until they are gone. Returns how many there were.

        `timeout`: seconds. Raises DeadlineExceededError, naming what is left, and other TPUErrors.
        """
        begun = self._clock()
        teardown = Teardown(self, self._stopwatch)
        while not teardown.step(late=self._clock() > begun + timeout / 2):
            if self._clock() > begun + timeout:
                raise DeadlineExceededError(f"still there: {teardown.left()}", resource=f"slices of {self.config.name}")
            self._sleep(poll)
        return len(teardown.found)

    def get_status(self) -> TPUStatus:
        """What is there now. Raises TPUError."""
        now = self._clock()
        existing = [dataclasses.replace(slice_status(item, now), existing=True) for item in self.existing_slices()]
        return self._status(self.list_slices(), existing)

    def labels(self, labels: Mapping[str, str]) -> dict[str, str]:
        """The labels of a slice: the user's, `labels`, and those by which we know it."""
        return {**self.config.labels, **labels, **self.owner_labels()}

    def owner_labels(self) -> dict[str, str]:
        """The labels by which every slice of this cluster is known."""
        return self._labels

    def refusal(self, name: str, *, when: bool = True) -> TPUError:
        """Why no zone can be asked for `name` now, with what every zone has said and, for those who try again, when that is."""
        last = self.policy.last_refusal(self.kind, self.zones)
        if last is None:
            hidden = ", ".join(sorted(self._sight.hidden))
            return TransientError(f"{hidden} does not answer" if hidden else "no zone was open a moment ago", resource=name)
        next_step = "; ".join([*self.policy.describe(self.kind, self.zones, when=when), last.next_step])
        return type(last)(last.words, resource=name, zone=last.zone, code=last.code, next_step=next_step)

    def check_ours(self, item: ClusterSlice) -> None:
        """Raises AlreadyExistsError when a slice of a name of ours is not ours, or of another type."""
        ours = self.owner_labels()
        if item.labels.get(OWNER_LABEL) != ours[OWNER_LABEL]:
            raise AlreadyExistsError("it exists and this cluster did not make it", resource=item.name, zone=item.zone)
        if item.labels.get(TYPE_LABEL) != ours[TYPE_LABEL] and item.life is not Life.DELETING:
            words = f"it exists as {item.accelerator_type}, not {self.config.accelerator.name}"
            raise AlreadyExistsError(words, resource=item.name, zone=item.zone, next_step="stop the cluster first, or choose another name")

    def _status(self, slices: Iterable[ClusterSlice], more: Iterable[SliceStatus] = ()) -> TPUStatus:
        now = self._clock()
        return TPUStatus(self.config.name, (*(slice_status(item, now) for item in slices), *more), self.config.slices)

    def _create(self, name: str, labels: Mapping[str, str], metadata: Mapping[str, str], zone: str | None) -> CreatedSlice:
        for candidate in [zone] if zone is not None else self.policy.open(self.kind, self._answering(self._sight.hidden)):
            try:
                return self._ask(candidate, name, labels, metadata)
            except REFUSALS as error:
                self._creations.end((candidate, name), error)
                log.info("%s", error)  # the policy has it, and tells it where nobody else takes the slice
                if zone is not None:
                    raise
        raise self.refusal(name)

    def _ask(self, zone: str, name: str, labels: Mapping[str, str], metadata: Mapping[str, str]) -> CreatedSlice:
        """One request to one zone. Raises TPUError; after one that leaves open what happened, `sweep` finds out."""
        if not self._bucket.take():
            words = f"we keep below the service's rate of creations; the next one in {self._bucket.wait_s():.0f} s"
            raise RateLimitedError(words, resource=name, zone=zone)
        self._creations.begin(zone, name)
        node = node_request(self.config, name, self.labels(labels), metadata)
        try:
            if self.config.queued_resource:
                operation = self.api.create_queued_resource(zone, queued_request(self.config, zone, node))
            else:
                operation = self.api.create_node(zone, node)
        except AlreadyExistsError:
            self._creations.end((zone, name))
            return self._adopt(zone, name)
        except RateLimitedError:
            self._bucket.drain()
            self._creations.end((zone, name))
            raise
        except TransientError as error:
            self.policy.refused(self.kind, zone, error)
            raise
        self._creations.begin(zone, name, operation)
        return CreatedSlice(name, zone, operation)

    def _adopt(self, zone: str, name: str) -> CreatedSlice:
        """The slice that has the name already. Raises TPUError when it is not ours, or is going."""
        queued = [item for item in self.api.list_queued_resources(zone) if item.name == name]
        nodes = [item for item in self.api.list_nodes(zone) if item.name == name]
        for item in merge(queued, nodes):
            self.check_ours(item)
            if item.step.wanted in (Action.KEEP, Action.WAIT) and item.life is not Life.DELETING:
                return CreatedSlice(name, zone, None, adopted=True)
        raise TransientError("the one before it is still being deleted", resource=name, zone=zone)

    def _is_leftover(self, item: ClusterSlice) -> bool:
        return item.life is Life.LOST or (item.life is Life.DELETING and item.given_up)

    def _answering(self, hidden: Collection[str]) -> list[str]:
        return [zone for zone in self.zones if zone not in hidden]

    def _waits_in_vain(self, item: ClusterSlice, hidden: Collection[str]) -> bool:
        """Whether it waits for capacity in one zone although there may be some in another one. It is asked for there when it is gone here:
        there are never two of one slice.
        """
        if not item.waits_for_capacity or self._clock() - item.created <= self.config.zone_patience_seconds:
            return False
        if not self.policy.better_than(self.kind, item.zone, self._answering(hidden)):
            return False
        self.policy.waited(self.kind, item.zone)
        return True

    def _together(self, function: Callable[[S], R], items: Sequence[S]) -> list[R]:
        if len(items) <= 1 or self._at_once == 1:
            return [function(item) for item in items]
        with ThreadPoolExecutor(self._at_once, thread_name_prefix="slices") as pool:
            return list(pool.map(function, items))

    def _gone(self, delete: Callable[[str, str], str], zone: str, name: str) -> bool:
        """Whether there was something to delete."""
        found = True
        try:
            delete(zone, name)
        except NotFoundError:
            found = False
        self._creations.end((zone, name))  # its end is our doing, and tells nothing about the zone
        return found


def _surplus(slices: Sequence[ClusterSlice]) -> list[ClusterSlice]:
    """Of slices with the same name all but the best: an answer that was lost can lead to a second one in another zone."""
    alike: dict[str, list[ClusterSlice]] = {}
    for item in slices:
        if item.life is not Life.DELETING:
            alike.setdefault(item.name, []).append(item)
    return [item for same in alike.values() for item in best_first(same)[1:]]
