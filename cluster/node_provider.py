"""Ray's face of the slices: one autoscaler instance is one slice.

Ray's autoscaler v2 calls this class from several threads. It asks for a listing once a tick and then for details of each node, so a
listing is kept and serves them all. A listing is complete or it raises: a slice missing from one would be taken for ended and made again.
Each listing also sweeps: what is left of lost slices is deleted, and late refusals are remembered for the next `create_node`.
"""

import logging
import threading
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

from cluster.autoscaler import HEAD_TYPE
from cluster.config import ClusterConfig
from cluster.logs import set_up_logging
from cluster.node_names import head_instance_id, slice_id
from cluster.schema import build
from cluster.tpu.errors import TPUError
from cluster.tpu.lifecycle import Life
from cluster.tpu.provider import TPUProvider
from cluster.tpu.refusals import write_refusals
from cluster.tpu.slices import ClusterSlice
from cluster.vm.bootstrap import startup_script
from cluster.vm.bundle import Bundle
from cluster.vm.metadata import HOST_ATTRIBUTE

logger = logging.getLogger(__name__)

TYPE_LABEL = "podlaunch-node-type"
REQUEST_LABEL = "podlaunch-request"
PATIENCE_S = 10.0
"""Ray asks again at its next tick, so a stumbling service need not be waited for here."""
STANDING = frozenset({Life.PENDING, Life.READY, Life.INTERRUPTED})
"""The lives in which Ray counts on a slice; the others are ended for it."""


class SliceNodeProvider(NodeProvider):
    """See Ray's `NodeProvider` for the interface."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str, slices: TPUProvider | None = None) -> None:
        """`slices`: who makes them, instead of one with a connection of its own; Ray gives the other two."""
        super().__init__(provider_config, cluster_name)
        set_up_logging(f"node-provider-{cluster_name}", terminal=None, only="cluster")
        config = build(ClusterConfig, provider_config["cluster"])
        if slices is None:
            slices = TPUProvider.connect(config, patience=PATIENCE_S, owner=provider_config["owner"])
        self._slices = slices
        bundle = Bundle.from_dict(provider_config["bundle"])
        self._metadata = {
            "startup-script": startup_script(bundle.hash, bundle.location),
            HOST_ATTRIBUTE: provider_config["host_settings"],
        }
        self._head = head_instance_id(cluster_name)
        self._lock = threading.Lock()
        self._known: dict[str, ClusterSlice] = {}
        self._requested: dict[str, int] = {}
        self._published: list[str] = []

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        listed = {s.name: s for s in self._slices.sweep() if s.life in STANDING}
        self._publish_refusals()
        with self._lock:
            self._known = listed
        return [node for node in [self._head, *listed] if tag_filters.items() <= self.node_tags(node).items()]

    def is_running(self, node_id: str) -> bool:
        return node_id == self._head or self._get(node_id).life is Life.READY

    def is_terminated(self, node_id: str) -> bool:
        with self._lock:
            return node_id != self._head and node_id not in self._known

    def node_tags(self, node_id: str) -> dict[str, str]:
        """Rebuilt from the resource's labels: what Ray gave at creation is lost with the head's memory."""
        if node_id == self._head:
            return {TAG_RAY_NODE_KIND: NODE_KIND_HEAD, TAG_RAY_USER_NODE_TYPE: HEAD_TYPE, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}
        labels = self._get(node_id).labels
        return {
            TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
            TAG_RAY_USER_NODE_TYPE: labels.get(TYPE_LABEL, ""),
            TAG_RAY_LAUNCH_REQUEST: labels.get(REQUEST_LABEL, ""),
            TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
        }

    def internal_ip(self, node_id: str) -> str:
        """Of worker 0; empty on the head and while the service does not know it yet."""
        return "" if node_id == self._head or not (hosts := self._get(node_id).hosts) else hosts[0]

    def external_ip(self, node_id: str) -> str:
        return self.internal_ip(node_id)

    def create_node(
        self,
        node_config: dict[str, Any],  # noqa: ARG002  # Ray's interface
        tags: dict[str, str],
        count: int,
    ) -> None:
        """Ask for `count` slices together and return at once: Ray has two threads for this and none may wait for a cloud.

        Raises TPUError: what was refused now, or what every zone has refused earlier and after Ray had been told that all was well.
        """
        request = tags.get(TAG_RAY_LAUNCH_REQUEST, "")
        labels = {TYPE_LABEL: tags[TAG_RAY_USER_NODE_TYPE], REQUEST_LABEL: request}
        names = [slice_id(self.cluster_name, request, index) for index in self._indices(request, count)]
        logger.info("creating slices %s for request %s", ", ".join(names), request)
        made = self._slices.create_slices(names, labels=labels, metadata=self._metadata)
        self._publish_refusals()
        errors = [result for result in made if isinstance(result, TPUError)]
        for error in errors:
            logger.warning("%s", error)
        if errors:
            raise errors[0]

    def _indices(self, request: str, count: int) -> range:
        """Ray splits a large request into several calls, five slices each, all with the same request id."""
        with self._lock:
            first = self._requested.get(request, 0)
            self._requested[request] = first + count
        return range(first, first + count)

    def _publish_refusals(self) -> None:
        """What zones have refused, for `tpu status`, which is another process."""
        lines = self._slices.policy.describe(self._slices.kind, self._slices.zones)
        with self._lock:
            if lines == self._published:
                return
            self._published = lines
        write_refusals(self.cluster_name, lines)

    def terminate_node(self, node_id: str) -> None:
        if node_id == self._head:
            return  # the head's life is its agent's business
        logger.info("deleting slice %s", node_id)
        with self._lock:
            known = self._known.get(node_id)
        if known is not None:
            self._slices.delete(known)
        else:
            self._slices.delete_slice(node_id)

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

    def _get(self, node_id: str) -> ClusterSlice:
        with self._lock:
            return self._known[node_id]
