"""What goes to the Cloud TPU v2 API and what comes back, as plain objects of ours.

Answers are read in raw protobuf, which is five times faster than through proto-plus.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.tpu.catalog import AcceleratorType
from cluster.tpu.errors import TPUError, from_status


@dataclass(frozen=True)
class NodeRequest:
    """What CreateNode is asked for."""

    node_id: str
    accelerator: AcceleratorType
    runtime_version: str
    labels: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    """`startup-script` and whatever else the hosts read from their metadata server."""
    tags: tuple[str, ...] = ()
    network: str | None = None
    subnetwork: str | None = None
    external_ips: bool = True
    service_account: str | None = None
    spot: bool = False
    reserved: bool = False
    disks: tuple[tuple[str, bool], ...] = ()
    """Every data disk's source and whether it is read only."""


@dataclass(frozen=True)
class QueuedRequest:
    """What CreateQueuedResource is asked for: one node, and how long it may wait. It bears the node's id."""

    node: NodeRequest
    valid_for_s: float
    reservation: str | None = None
    """Full name, projects/P/locations/Z/reservations/R."""


@dataclass(frozen=True)
class Slice:
    """A node of the API: one slice."""

    name: str
    """The node id, without the path."""
    zone: str
    state: str
    """google.cloud.tpu.v2.Node.State by name; cluster.tpu.lifecycle says what it means."""
    accelerator_type: str
    topology: str
    hosts: tuple[str, ...]
    """Internal address of every host, in worker order; empty until the service knows them."""
    labels: Mapping[str, str]
    created: float
    """Seconds since the epoch."""
    health: str
    health_description: str
    spot: bool


@dataclass(frozen=True)
class QueuedResource:
    """A queued resource of the API: a request for slices that waits for capacity."""

    name: str
    zone: str
    state: str
    """google.cloud.tpu.v2.QueuedResourceState.State by name; cluster.tpu.lifecycle says what it means."""
    accelerator_type: str
    node_ids: tuple[str, ...]
    labels: Mapping[str, str]
    """Those of its node: a queued resource has none of its own."""
    created: float
    """Seconds since the epoch."""
    spot: bool
    error: TPUError | None
    """Why it FAILED, when the service says so."""


@dataclass(frozen=True)
class Operation:
    """A long-running operation."""

    name: str
    done: bool
    error: TPUError | None
    """Why it failed; None while it runs and after success."""


def raw(message: Any) -> Any:
    return type(message).pb(message)


def to_node(request: NodeRequest) -> Any:
    """google.cloud.tpu.v2.Node for a request. A topology other than the type's own can only be said by accelerator_config."""
    from google.cloud import tpu_v2

    node = tpu_v2.Node(
        runtime_version=request.runtime_version,
        network_config=tpu_v2.NetworkConfig(
            network=request.network or "", subnetwork=request.subnetwork or "", enable_external_ips=request.external_ips
        ),
        scheduling_config=tpu_v2.SchedulingConfig(spot=request.spot, reserved=request.reserved),
        data_disks=[tpu_v2.AttachedDisk(source_disk=source, mode=_disk_mode(read_only)) for source, read_only in request.disks],
        labels=dict(request.labels),
        metadata=dict(request.metadata),
        tags=list(request.tags),
    )
    if request.service_account is not None:
        scope = ["https://www.googleapis.com/auth/cloud-platform"]
        node.service_account = tpu_v2.ServiceAccount(email=request.service_account, scope=scope)
    if request.accelerator.default_topology:
        node.accelerator_type = request.accelerator.name
    else:
        kind = getattr(tpu_v2.AcceleratorConfig.Type, _CONFIG_TYPE[request.accelerator.generation])
        node.accelerator_config = tpu_v2.AcceleratorConfig(type_=kind, topology=request.accelerator.topology)
    return node


def to_queued_resource(parent: str, request: QueuedRequest) -> Any:
    """google.cloud.tpu.v2.QueuedResource for a request. Spot is said once, by the tier, as gcloud does."""
    from google.cloud import tpu_v2
    from google.protobuf import duration_pb2

    spot = request.node.spot
    node = to_node(dataclasses.replace(request.node, spot=False))
    spec = tpu_v2.QueuedResource.Tpu.NodeSpec(parent=parent, node_id=request.node.node_id, node=node)
    queued = tpu_v2.QueuedResource(
        tpu=tpu_v2.QueuedResource.Tpu(node_spec=[spec]),
        queueing_policy=tpu_v2.QueuedResource.QueueingPolicy(
            valid_until_duration=duration_pb2.Duration(seconds=round(request.valid_for_s)),
        ),
        reservation_name=request.reservation or "",
    )
    if spot:
        queued.spot = tpu_v2.QueuedResource.Spot()
    return queued


def _disk_mode(read_only: bool) -> Any:
    from google.cloud import tpu_v2

    return tpu_v2.AttachedDisk.DiskMode.READ_ONLY if read_only else tpu_v2.AttachedDisk.DiskMode.READ_WRITE


_CONFIG_TYPE = {"v2": "V2", "v3": "V3", "v4": "V4", "v5e": "V5LITE_POD", "v5p": "V5P", "v6e": "V6E"}


def to_slice(node: Any) -> Slice:
    """From a raw google.cloud.tpu.v2.Node."""
    parts = node.name.split("/")
    return Slice(
        name=parts[-1],
        zone=parts[3],
        state=_names(node.DESCRIPTOR, "State").get(node.state, "UNKNOWN"),
        accelerator_type=node.accelerator_type,
        topology=node.accelerator_config.topology,
        hosts=tuple([endpoint.ip_address for endpoint in node.network_endpoints]),
        labels=dict(node.labels),
        created=node.create_time.ToNanoseconds() / 1e9,
        health=_names(node.DESCRIPTOR, "Health").get(node.health, "HEALTH_UNSPECIFIED"),
        health_description=node.health_description,
        spot=node.scheduling_config.spot or node.scheduling_config.preemptible,
    )


def to_queued(queued: Any) -> QueuedResource:
    """From a raw google.cloud.tpu.v2.QueuedResource."""
    parts = queued.name.split("/")
    specs = queued.tpu.node_spec
    node = specs[0].node if specs else None
    state = queued.state
    failed = state.failed_data.error if state.HasField("failed_data") else None
    has_reason = failed is not None and (failed.code or failed.message)
    return QueuedResource(
        name=parts[-1],
        zone=parts[3],
        state=_names(state.DESCRIPTOR, "State").get(state.state, "STATE_UNSPECIFIED"),
        accelerator_type=node.accelerator_type if node is not None else "",
        node_ids=tuple([spec.node_id for spec in specs]),
        labels=dict(node.labels) if node is not None else {},
        created=queued.create_time.ToNanoseconds() / 1e9,
        spot=queued.HasField("spot"),
        error=from_status(failed, resource=parts[-1], zone=parts[3]) if has_reason else None,
    )


@functools.cache  # asked twice for every slice of a listing
def _names(message: Any, enum: str) -> Mapping[int, str]:
    """The names of an enum that is declared in a message, by number."""
    return {value.number: value.name for value in message.enum_types_by_name[enum].values}
