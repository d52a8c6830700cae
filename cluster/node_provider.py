"""Ray's face of the slices: one autoscaler instance is one slice.

Ray's autoscaler v2 calls this class from several threads. It asks for a listing once a tick and then for details of each node, so what a
listing showed is kept and serves them all. A listing is complete or it raises: a slice missing from one would be taken for ended and made
again. Each listing also sweeps: what is left of lost slices is deleted, and what could not be deleted before is deleted again.

What Ray asks for becomes an order at once and is asked for on threads of our own: no thread of Ray's waits for a cloud.
"""

import functools
import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_LAUNCH_REQUEST,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from cluster.autoscaler import HEAD_TYPE, node_type, settings_of_type
from cluster.churn import Churn, ShortLivedError
from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from cluster.existing import existing_type
from cluster.host_watch import HostWatch
from cluster.logs import set_up_logging
from cluster.node_names import head_instance_id, slice_id
from cluster.orders import Order, Orders
from cluster.ray_nodes import RayNodes, SliceHosts
from cluster.schema import build
from cluster.tpu.errors import (
    NotFoundError,
    NotInZoneError,
    QuotaError,
    RateLimitedError,
    ReservationError,
    StockoutError,
    TPUError,
    TransientError,
    UnknownError,
)
from cluster.tpu.lifecycle import Life
from cluster.tpu.losses import Losses
from cluster.tpu.provider import TPUProvider
from cluster.tpu.refusals import write_refusals
from cluster.tpu.sight import Sight
from cluster.tpu.slices import ClusterSlice
from cluster.vm.bootstrap import host_metadata
from cluster.vm.bundle import Bundle
from cluster.vm.settings import HostSettings

logger = logging.getLogger(__name__)

TYPE_LABEL = "podlaunch-node-type"
REQUEST_LABEL = "podlaunch-request"
PATIENCE_S = 10.0
"""An order is tried again anyway, so a stumbling service need not be waited for in one try."""
STANDING = frozenset({Life.PENDING, Life.READY, Life.INTERRUPTED})
"""The lives in which Ray counts on a slice; the others are ended for it."""
_TOLD = (StockoutError, QuotaError, ReservationError, NotInZoneError, TransientError, RateLimitedError)
"""After these the zones' policy knows when the next try makes sense."""
_LIVING = frozenset({Life.READY, Life.INTERRUPTED})
_TOGETHER = 16
"""Orders that are asked for at once."""

Submit = Callable[..., object]
"""As `Executor.submit`."""


@dataclass(frozen=True)
class _Type:
    """One type of slice of the cluster."""

    config: ClusterConfig
    slices: TPUProvider
    metadata: dict[str, str]


class SliceNodeProvider(NodeProvider):
    """See Ray's `NodeProvider` for the interface."""

    def __init__(
        self,
        provider_config: dict[str, Any],
        cluster_name: str,
        slices: TPUProvider | None = None,
        *,
        clock: Callable[[], float] = time.time,
        submit: Submit | None = None,
        ray_nodes: RayNodes | None = None,
    ) -> None:
        """Ray gives the first two. `slices`: who makes them, instead of one with a connection of its own. `clock`: seconds since the epoch.
        `submit`: runs what may wait, instead of threads of its own. `ray_nodes`: Ray's node table, instead of the head's.
        """
        super().__init__(provider_config, cluster_name)
        set_up_logging(f"node-provider-{cluster_name}", terminal=None, only="cluster")
        self._config = build(ClusterConfig, provider_config["cluster"])
        if slices is None:
            slices = TPUProvider.connect(self._config.of_type(None), patience=PATIENCE_S, owner=provider_config["owner"])
        self._slices = slices
        settings = HostSettings.from_dict(json.loads(provider_config["host_settings"]))
        bundle = Bundle.from_dict(provider_config["bundle"])
        self._types = {
            node_type(kind): _Type(
                kind,
                self._slices if index == 0 else self._slices.sibling(kind),
                host_metadata(bundle, settings_of_type(settings, kind)),
            )
            for index, kind in enumerate(self._config.types)
        }
        zones = list(dict.fromkeys(zone for kind in self._types.values() for zone in kind.slices.zones))
        self._sight = Sight(self._slices.api, cluster_name, zones)
        self._head = head_instance_id(cluster_name)
        self._clock = clock
        self._submit = submit if submit is not None else ThreadPoolExecutor(_TOGETHER, thread_name_prefix="orders").submit
        self._orders = Orders(clock)
        self._ray = ray_nodes if ray_nodes is not None else RayNodes.at(settings.head_address)
        self._watch = HostWatch(clock, self._config.boot_grace_seconds, self._config.host_grace_seconds)
        self._churn = Churn(clock, self._config.churn_window_seconds, self._config.churn_short_seconds, self._config.churn_thresholds)
        self._existing_type = existing_type(node_type(self._config))
        self._losses = Losses(cluster_name)
        self._lock = threading.Lock()
        self._standing: dict[str, ClusterSlice] = {}
        self._shown: dict[str, ClusterSlice | Order] = {}
        self._hosts: dict[str, SliceHosts] = {}
        self._doomed: set[str] = set()
        self._dismissed: set[str] = set()
        self._requested: dict[str, int] = {}
        self._published: list[str] = []

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        began = self._clock()
        swept = self._sweep()
        self._losses.take(swept, began)
        standing = {item.name: item for item in swept if item.life in STANDING}
        # Those that were made elsewhere are listed by themselves: what sweeps and deletes never sees them.
        elsewhere = {item.name: item for item in self._slices.existing_slices() if item.life in STANDING}
        there = {item.name for item in swept}
        self._orders.listed(standing.keys(), there - standing.keys(), self._unseen(), began)
        waiting = {order.name: order for order in self._orders.all()}
        self._look_at_hosts(standing)
        with self._lock:
            self._standing, self._shown = standing, {**waiting, **standing, **elsewhere}
            shown = list(self._shown)
            self._doomed &= there | waiting.keys()
            self._dismissed &= there
            doomed = [item for name, item in standing.items() if name in self._doomed]
        self._orders.shown(shown)
        self._end_again(doomed)
        self._work()
        self._publish_refusals()
        return [node for node in [self._head, *shown] if tag_filters.items() <= self.node_tags(node).items()]

    def is_running(self, node_id: str) -> bool:
        if node_id == self._head:
            return True
        item = self._get(node_id)
        return isinstance(item, ClusterSlice) and item.life is Life.READY

    def is_terminated(self, node_id: str) -> bool:
        with self._lock:
            return node_id != self._head and node_id not in self._shown

    def node_tags(self, node_id: str) -> dict[str, str]:
        """Rebuilt from the resource's labels: what Ray gave at creation is lost with the head's memory."""
        if node_id == self._head:
            return {TAG_RAY_NODE_KIND: NODE_KIND_HEAD, TAG_RAY_USER_NODE_TYPE: HEAD_TYPE, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}
        if node_id in self._config.existing:
            kind = self._existing_type
            return {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_USER_NODE_TYPE: kind, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}
        item = self._get(node_id)
        if isinstance(item, Order):
            node_type, request = item.node_type, item.request
        else:
            labels = item.labels
            node_type, request = labels.get(TYPE_LABEL, ""), labels.get(REQUEST_LABEL, "")
        return {
            TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
            TAG_RAY_USER_NODE_TYPE: node_type,
            TAG_RAY_LAUNCH_REQUEST: request,
            TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
        }

    def internal_ip(self, node_id: str) -> str:
        """Of worker 0; empty on the head and while the service does not know it yet."""
        if node_id == self._head:
            return ""
        item = self._get(node_id)
        return item.hosts[0] if isinstance(item, ClusterSlice) and item.hosts else ""

    def external_ip(self, node_id: str) -> str:
        return self.internal_ip(node_id)

    def create_node(
        self,
        node_config: dict[str, Any],  # noqa: ARG002  # Ray's interface
        tags: dict[str, str],
        count: int,
    ) -> None:
        """Order `count` slices and return at once: an order that cannot be served now waits, and `tpu status` says why.

        Raises ConfigError for a type that the cluster does not have.
        """
        request, name_of_type = tags.get(TAG_RAY_LAUNCH_REQUEST, ""), tags[TAG_RAY_USER_NODE_TYPE]
        if name_of_type == self._existing_type:
            raise NotFoundError("it is not there any more, and only you can make it", resource=", ".join(self._config.existing))
        if name_of_type not in self._types:
            raise ConfigError(f"cluster {self.cluster_name!r} has no slices of {name_of_type}, only of {', '.join(self._types)}")
        names = [slice_id(self.cluster_name, request, index) for index in self._indices(request, count)]
        logger.info("slices %s are ordered by request %s", ", ".join(names), request)
        self._orders.add(Order(name, name_of_type, request) for name in names)
        self._work()

    def terminate_node(self, node_id: str) -> None:
        """Raises TPUError when it could not be asked for; it is asked for again at each listing, whatever Ray does."""
        if node_id == self._head:
            return  # the head's life is its agent's business
        if node_id in self._config.existing:
            logger.info("slice %s was made elsewhere and is not deleted", node_id)
            return
        logger.info("deleting slice %s", node_id)
        with self._lock:
            self._doomed.add(node_id)
            known = self._standing.get(node_id)
            hosts = self._hosts.get(node_id)
            if hosts is None or not hosts.in_use:
                self._dismissed.add(node_id)
        order = self._orders.get(node_id)
        if not self._orders.cancel(node_id):
            return
        if known is not None:
            self._slices.delete(known)
        else:
            for kind in [self._types[order.node_type]] if order is not None else self._types.values():
                kind.slices.delete_slice(node_id)

    def terminate_nodes(self, node_ids: list[str]) -> None:
        """Tries all of them. Raises TPUError when one could not be asked for, and Ray asks for all again."""
        errors = []
        for node_id in node_ids:
            try:
                self.terminate_node(node_id)
            except TPUError as error:
                logger.warning("%s", error)
                errors.append(error)
        if errors:
            raise errors[0]

    def _sweep(self) -> list[ClusterSlice]:
        """One listing for all types."""
        if len(self._types) == 1:
            return self._slices.sweep()
        view = self._sight.look()
        swept: list[ClusterSlice] = []
        for name, kind in self._types.items():
            swept += kind.slices.sweep(view.part(functools.partial(self._is_of_type, name), kind.slices.zones))
        return swept

    def _is_of_type(self, name: str, item: ClusterSlice) -> bool:
        return self._type_of(item) == name

    def _type_of(self, item: ClusterSlice) -> str:
        """The node type that looks after a slice; of one that no configuration knows any more the cluster's own."""
        name = item.labels.get(TYPE_LABEL, "")
        return name if name in self._types else next(iter(self._types))

    def _unseen(self) -> set[str]:
        return {name for kind in self._types.values() for name in kind.slices.unseen()}

    def _indices(self, request: str, count: int) -> range:
        """Ray splits a large request into several calls, five slices each, all with the same request id."""
        with self._lock:
            first = self._requested.get(request, 0)
            self._requested[request] = first + count
        return range(first, first + count)

    def _work(self) -> None:
        """Ask for what is ordered and can be asked for now."""
        for order in self._orders.take(self._room):
            self._submit(self._make, order)

    def _room(self, node_type: str, started: Collection[Order]) -> int:
        """How many more slices of a type may be asked for: what Ray has given up and what still stands counts as well."""
        with self._lock:
            names = {name for name, item in self._standing.items() if item.labels.get(TYPE_LABEL) == node_type}
        names |= {order.name for order in started if order.node_type == node_type}
        config = self._types[node_type].config
        return config.effective_max_slices - len(config.existing) - len(names)

    def _make(self, order: Order) -> None:
        """Ask for one slice, on a thread of ours."""
        try:
            wanted = self._ask(order)
        except Exception as error:  # the outermost frame of the thread: an order must not hang for a mistake of ours
            logger.exception("slice %s could not be asked for", order.name)
            wanted = self._orders.refused(order.name, UnknownError(f"{type(error).__name__}: {error}", resource=order.name), told=False)
        if not wanted:
            self._end(order)
        self._publish_refusals()

    def _ask(self, order: Order) -> bool:
        """Whether the slice is still wanted."""
        labels = {TYPE_LABEL: order.node_type, REQUEST_LABEL: order.request}
        kind = self._types[order.node_type]
        try:
            made = kind.slices.create_slice(order.name, labels=labels, metadata=kind.metadata)
        except TPUError as error:
            logger.warning("%s", error)
            closed = not kind.slices.policy.open(kind.slices.kind, kind.slices.zones)
            return self._orders.refused(order.name, error, told=closed or isinstance(error, _TOLD))
        logger.info("slice %s is asked for in %s", order.name, made.zone)
        return self._orders.accepted(order.name)

    def _end(self, order: Order) -> None:
        """Delete what nobody wants any more; what fails is done again when a listing shows it."""
        try:
            self._types[order.node_type].slices.delete_slice(order.name)
        except TPUError as error:
            logger.warning("left for the next time: %s", error)

    def _look_at_hosts(self, standing: Mapping[str, ClusterSlice]) -> None:
        """Give up slices that have lacked hosts for too long, and ask places less often that keep killing slices."""
        living = {name: item for name, item in standing.items() if item.life in _LIVING}
        hosts = self._ray.look() if living else {}
        sick = self._watch.sick(standing.values(), hosts)
        with self._lock:
            self._hosts = hosts if hosts is not None else self._hosts
            fresh = {name: reason for name, reason in sick.items() if name not in self._doomed}
            self._doomed |= fresh.keys()
            dismissed = set(self._dismissed)
        for name, reason in fresh.items():
            logger.warning("deleting slice %s in %s: %s", name, living[name].zone, reason)
            if hosts is not None and name in hosts:
                self._ray.drain(hosts[name], f"podlaunch: {reason}")
        alive = {name: (self._types[self._type_of(item)].slices.kind, item.zone) for name, item in living.items() if name not in sick}
        for verdict in self._churn.take(alive, dismissed):
            logger.warning("%s in %s: %s", *verdict.place, verdict.words)
            error = ShortLivedError(verdict.words, resource=f"slices of {verdict.place[0]}", zone=verdict.place[1])
            self._slices.policy.hold(*verdict.place, verdict.pause_s, error)

    def _end_again(self, doomed: list[ClusterSlice]) -> None:
        if doomed:
            for error in self._slices.delete_all(doomed):
                logger.warning("left for the next time: %s", error)

    def _publish_refusals(self) -> None:
        """Why slices wait, for `tpu status`, which is another process."""
        lines = []
        for kind in self._types.values():
            told = kind.slices.policy.describe(kind.slices.kind, kind.slices.zones)
            lines += told if len(self._types) == 1 else [f"{kind.slices.kind}: {line}" for line in told]
        lines += self._orders.problems()
        with self._lock:
            if lines == self._published:
                return
            self._published = lines
        write_refusals(self.cluster_name, lines)

    def _get(self, node_id: str) -> ClusterSlice | Order:
        with self._lock:
            return self._shown[node_id]
