"""TPUProvider: the slices of one cluster, made, listed and deleted.

`create_slice`, `delete_slice` and `list_slices` ask and return; whoever keeps a cluster going (Ray's node provider) builds on them.
`start`, `stop` and `get_status` wait and are for whoever wants slices without Ray.
"""

import importlib.metadata
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.config import TPUConfig
from cluster.errors import ConfigError
from cluster.tpu import catalog
from cluster.tpu.api import NodeRequest, Slice, TpuApi
from cluster.tpu.bringup import Bringup
from cluster.tpu.errors import AlreadyExistsError, DeadlineExceededError, NotFoundError, TPUError
from cluster.tpu.lifecycle import BILLED, Life, life

OWNER_LABEL = "podlaunch-cluster"
VERSION_LABEL = "podlaunch-version"
TYPE_LABEL = "podlaunch-type"


@dataclass(frozen=True)
class CreatedSlice:
    """A slice that was asked for."""

    name: str
    zone: str
    operation: str | None
    """None when the operation's name was lost; the node's own state tells then."""


@dataclass(frozen=True)
class SliceStatus:
    name: str
    zone: str
    state: str
    """As the API names it."""
    life: Life
    accelerator_type: str
    hosts: tuple[str, ...]
    health: str
    age_seconds: float
    usd_per_hour: float | None
    """Estimated list price now; 0 while it is not billed, None when the catalogue has no price."""


@dataclass(frozen=True)
class TPUStatus:
    name: str
    slices: tuple[SliceStatus, ...]
    wanted: int
    """How many slices the configuration asks for."""

    @property
    def ready(self) -> bool:
        return sum(item.life is Life.READY for item in self.slices) >= self.wanted

    @property
    def usd_per_hour(self) -> float:
        """What the slices cost together now, those without a price left out."""
        return sum(item.usd_per_hour or 0.0 for item in self.slices)


class TPUProvider:
    """The slices of the cluster `config.name`. Safe to use from several threads."""

    def __init__(
        self, config: TPUConfig, api: TpuApi, *, clock: Callable[[], float] = time.time, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """`clock`: seconds since the epoch. Raises ConfigError when project or zones are missing."""
        if api.project != config.effective_project:
            raise ConfigError(f"project {config.effective_project!r}: the connection is to project {api.project!r}")
        self.config, self.api = config, api
        self.zones = config.effective_zones
        self._clock, self._sleep = clock, sleep

    @classmethod
    def connect(cls, config: TPUConfig) -> "TPUProvider":
        """With a connection of its own, to where `config` says. Raises as the constructor and TpuApi do."""
        return cls(config, TpuApi(config.endpoint, config.effective_project))

    def create_slice(
        self, slice_id: str, *, labels: Mapping[str, str] | None = None, metadata: Mapping[str, str] | None = None, zone: str | None = None
    ) -> CreatedSlice:
        """Ask for a slice in `zone`, or in the first of the configured zones that takes the request. Does not wait.

        Raises TPUError; what is refused later is the operation's error.
        """
        request = self.request(slice_id, labels or {}, metadata or {})
        candidates = [zone] if zone is not None else self.zones
        for last, candidate in _with_last(candidates):
            try:
                return CreatedSlice(slice_id, candidate, self.api.create_node(candidate, request))
            except TPUError as error:
                if last or not error.another_zone_may_help:
                    raise
        raise AssertionError("zones are never empty")

    def delete_slice(self, name: str, zone: str | None = None) -> bool:
        """Ask for a slice's end, in `zone` or wherever it is. Does not wait. False: there is no such slice. Raises TPUError."""
        found = False
        for candidate in [zone] if zone is not None else self.zones:
            try:
                self.api.delete_node(candidate, name)
                found = True
            except NotFoundError:
                continue
        return found

    def list_slices(self, labels: Mapping[str, str] | None = None) -> list[Slice]:
        """The cluster's slices that carry `labels`, in every state. Complete over all zones, or a TPUError."""
        wanted = {OWNER_LABEL: self.config.name, **(labels or {})}
        return [node for node in self._list_all() if wanted.items() <= node.labels.items()]

    def start(self, *, metadata: Mapping[str, str] | None = None, timeout: float | None = None, poll: float = 1.0) -> TPUStatus:
        """Bring up slices `<name>-0` .. `<name>-<slices-1>` and wait until they are READY. What is there already is kept.

        `timeout`: seconds, None for a limit by size. When it fails, what this call has created is deleted again, so that no slice bills
        for nobody. Raises TPUError: why the last zone refused, AlreadyExistsError when a name is taken by a node that is not ours,
        DeadlineExceededError.
        """
        deadline = self._clock() + (timeout if timeout is not None else ready_timeout(self.config.slices * self.config.hosts_per_slice))

        def create(name: str, zone: str) -> str | None:
            return self.create_slice(name, metadata=metadata, zone=zone).operation

        slices = [Bringup(f"{self.config.name}-{index}", self.zones, self.api, create) for index in range(self.config.slices)]
        try:
            while not self._step(slices):
                if self._clock() > deadline:
                    waiting = ", ".join(f"{item.name} ({item.last_seen})" for item in slices if not item.ready)
                    raise DeadlineExceededError(f"not READY in time: {waiting}", resource=f"slices of {self.config.name}")
                self._sleep(poll)
        except BaseException:  # an interrupt as well: whatever ends the wait must not leave slices that bill
            for item in slices:
                item.undo()
            raise
        return self.get_status()

    def stop(self, *, timeout: float = 600.0, poll: float = 1.0) -> int:
        """Delete all slices of the cluster and wait until they are gone. Returns how many there were.

        `timeout`: seconds. Raises DeadlineExceededError, naming what is left, and other TPUErrors.
        """
        deadline = self._clock() + timeout
        asked: set[tuple[str, str]] = set()
        while left := self.list_slices():
            for node in left:
                if life(node) is not Life.DELETING:
                    self.delete_slice(node.name, node.zone)
                asked.add((node.zone, node.name))
            if self._clock() > deadline:
                names = ", ".join(f"{node.name} in {node.zone} ({node.state})" for node in left)
                raise DeadlineExceededError(f"still there: {names}", resource=f"slices of {self.config.name}")
            self._sleep(poll)
        return len(asked)

    def get_status(self) -> TPUStatus:
        """What is there now. Raises TPUError."""
        return TPUStatus(self.config.name, tuple(self._status(node) for node in self.list_slices()), self.config.slices)

    def request(self, slice_id: str, labels: Mapping[str, str], metadata: Mapping[str, str]) -> NodeRequest:
        """The exact request that `create_slice` sends. A named reservation is chosen by the service: the v2 node has no field for it."""
        config = self.config
        return NodeRequest(
            node_id=slice_id,
            accelerator=config.accelerator,
            runtime_version=config.effective_runtime_version,
            labels={**config.labels, **labels, **self.owner_labels()},
            metadata=dict(metadata),
            tags=tuple(config.tags),
            network=config.network,
            subnetwork=config.subnetwork,
            external_ips=config.external_ips,
            service_account=config.service_account,
            spot=config.provisioning == "spot",
            reserved=config.provisioning == "reserved",
        )

    def owner_labels(self) -> dict[str, str]:
        """The labels by which every slice of this cluster is known."""
        version = importlib.metadata.version("podlaunch")
        return {OWNER_LABEL: self.config.name, VERSION_LABEL: _label_value(version), TYPE_LABEL: _label_value(self.config.accelerator.name)}

    def _list_all(self) -> list[Slice]:
        return [node for zone in self.zones for node in self.api.list_nodes(zone)]

    def _step(self, slices: Sequence[Bringup]) -> bool:
        """Move every slice one step on, by one listing; True when all are READY."""
        nodes = self._list_all()
        for item in slices:
            item.step(self._find(item.name, nodes))
        return all(item.ready for item in slices)

    def _find(self, name: str, nodes: Sequence[Slice]) -> Slice | None:
        """The node of that name, if any. Raises AlreadyExistsError when it is not ours or of another type."""
        found = [node for node in nodes if node.name == name]
        # One that is being deleted gives way to one that lives in another zone.
        found.sort(key=lambda node: life(node) is Life.DELETING)
        if not found:
            return None
        node, ours = found[0], self.owner_labels()
        if node.labels.get(OWNER_LABEL) != ours[OWNER_LABEL]:
            raise AlreadyExistsError("a node of that name exists that this cluster did not make", resource=name, zone=node.zone)
        if node.labels.get(TYPE_LABEL) != ours[TYPE_LABEL] and life(node) is not Life.DELETING:
            words = f"it exists as {node.accelerator_type}, not {self.config.accelerator.name}"
            raise AlreadyExistsError(words, resource=name, zone=node.zone, next_step="stop the cluster first, or choose another name")
        return node

    def _status(self, node: Slice) -> SliceStatus:
        now = life(node)
        return SliceStatus(
            name=node.name,
            zone=node.zone,
            state=node.state,
            life=now,
            accelerator_type=node.accelerator_type,
            hosts=node.hosts,
            health=node.health,
            age_seconds=max(0.0, self._clock() - node.created),
            usd_per_hour=_usd_per_hour(node) if now in BILLED else 0.0,
        )


def ready_timeout(hosts: int) -> float:
    """Seconds that `hosts` hosts may take until READY: 600, 900 from 64 on, 1800 from 256 (what marin-community/marin came to use)."""
    return 600.0 if hosts < 64 else 900.0 if hosts < 256 else 1800.0


def _usd_per_hour(node: Slice) -> float | None:
    kind = catalog.by_name().get(node.accelerator_type)
    if kind is None:
        return None
    price = kind.usd_per_chip_hour_spot if node.spot else kind.usd_per_chip_hour
    return None if price is None else price * kind.chips


def _label_value(text: str) -> str:
    """`text` as Google allows it in a label's value."""
    return re.sub(r"[^-_a-z0-9]", "-", text.lower())[:63]


def _with_last(items: Sequence[str]) -> list[tuple[bool, str]]:
    return [(index == len(items) - 1, item) for index, item in enumerate(items)]
