"""What Ray knows of the hosts of slices: its own node table, as the autoscaler reads it on the head."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.core.generated import autoscaler_pb2
from ray.exceptions import RayError

logger = logging.getLogger(__name__)

SLICE_LABEL = "ray.io/tpu-slice-name"
WORKER_LABEL = "ray.io/tpu-worker-id"
_DRAIN_S = 30.0
_PB: Any = autoscaler_pb2  # generated, without types
_STATUS = _PB.NodeStatus


@dataclass(frozen=True)
class SliceHosts:
    """The hosts of one slice that live for Ray."""

    alive: dict[int, str]
    """Worker id -> Ray's node id, in hex."""
    in_use: bool
    """Whether somebody holds the slice, by what worker 0 said last."""


class RayNodes:
    """Reads Ray's node table. `client` is Ray's GcsClient, made when it is first needed: the head starts together with us."""

    def __init__(self, client: Callable[[], Any], clock: Callable[[], float] = time.time) -> None:
        """`clock`: seconds since the epoch."""
        self._make, self._clock = client, clock
        self._client: Any = None
        self._in_use: dict[str, bool] = {}

    @classmethod
    def at(cls, address: str) -> "RayNodes":
        """`address`: host:port of Ray's head."""

        def client() -> Any:
            from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, without types

            return GcsClient(address=address)

        return cls(client)

    def look(self) -> dict[str, SliceHosts] | None:
        """The hosts of every slice that has any, by the slice's name; None when Ray does not answer."""
        state = _PB.GetClusterResourceStateReply()
        try:
            if self._client is None:
                self._client = self._make()
            state.ParseFromString(self._client.get_cluster_resource_state())
        except (RayError, OSError, RuntimeError) as error:  # what Ray's client raises for a lost connection
            logger.warning("Ray does not tell its nodes: %s", error)
            return None
        alive: dict[str, dict[int, str]] = {}
        for node in state.cluster_resource_state.node_states:
            name, worker = node.labels.get(SLICE_LABEL), node.labels.get(WORKER_LABEL, "")
            if not name or not worker.isdigit():
                continue
            hosts = alive.setdefault(name, {})
            if node.status in (_STATUS.RUNNING, _STATUS.IDLE):
                hosts[int(worker)] = node.node_id.hex()
                if int(worker) == 0:
                    self._in_use[name] = node.status == _STATUS.RUNNING
        self._in_use = {name: used for name, used in self._in_use.items() if name in alive}
        return {name: SliceHosts(hosts, self._in_use.get(name, False)) for name, hosts in alive.items()}

    def drain(self, hosts: SliceHosts, reason: str) -> None:
        """Let Ray place nothing more there. What fails is only written down: the slice is deleted in any case."""
        deadline = int((self._clock() + _DRAIN_S) * 1000)
        for ray_id in hosts.alive.values():
            try:
                self._client.drain_node(ray_id, _PB.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, reason, deadline)
            except (RayError, OSError, RuntimeError) as error:
                logger.warning("Ray node %s is not drained: %s", ray_id, error)
