"""What the emulated cloud holds: nodes and instances with their hosts, operations, and the refusals it answers with."""

import math
from dataclasses import dataclass, field
from typing import Any

from cluster.emulator.instance_states import State
from cluster.processes import ProcessRecord
from cluster.tpu.catalog import AcceleratorType


class Refusal(Exception):
    """The service refuses a request: a google.rpc.Code, the service's words, and the details that go with them."""

    def __init__(self, code: int, words: str, details: tuple[Any, ...] = ()) -> None:
        """`details`: raw protobuf messages, such as google.rpc.QuotaFailure."""
        super().__init__(words)
        self.code, self.words, self.details = code, words, details


@dataclass
class HostRecord:
    """One host of a node."""

    worker: int
    ip: str
    metadata_port: int = 0
    """Port of its metadata server on `ip`; 0 until there is one."""
    process: ProcessRecord | None = None
    """What runs the startup script; None until it is started, and always where hosts have no processes."""
    exited: bool = False
    """The startup script has ended. As on the real cloud, the node stays READY."""
    held: bool = False
    """A fault keeps it from booting."""
    boots_at: float | None = None
    """When that is over, seconds since the epoch; None: never."""


@dataclass
class NodeRecord:
    """One node: the message that the API shows, and what is behind it."""

    message: Any
    """Raw google.cloud.tpu.v2.Node."""
    uid: str
    """Differs for two nodes that carry the same name one after the other."""
    kind: AcceleratorType
    hosts: list[HostRecord] = field(default_factory=list)
    operation: str = ""
    """The operation that works on it, or did last; empty where a queued resource made it."""
    holds: bool = False
    """Whether capacity of its zone is taken up by it."""
    notices: dict[str, str] = field(default_factory=dict)
    """Metadata that says something else than usual, such as instance/preempted."""

    @property
    def path(self) -> str:
        return str(self.message.name)

    @property
    def parent(self) -> str:
        return self.path.rpartition("/nodes/")[0]

    @property
    def queued(self) -> str:
        """The queued resource that it belongs to, or empty."""
        return str(self.message.queued_resource)

    @property
    def node_id(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def title(self) -> str:
        return self.node_id

    @property
    def startup_script(self) -> str:
        return str(self.message.metadata.get("startup-script", ""))

    @property
    def chips_per_host(self) -> int:
        return self.kind.chips_per_host

    @property
    def project(self) -> str:
        return self.path.split("/")[1]

    @property
    def zone(self) -> str:
        return self.path.split("/")[3]


@dataclass
class InstanceRecord:
    """One instance of Compute Engine: what the API shows, and what is behind it."""

    path: str
    """projects/P/zones/Z/instances/N"""
    body: dict[str, Any]
    """compute.v1.Instance as JSON."""
    uid: str
    """Differs for two instances that carry the same name one after the other."""
    hosts: list[HostRecord]
    """One."""
    operation: str
    """The operation that works on it, or did last."""
    goes: bool = False
    """It is deleted when its processes have ended."""

    @property
    def state(self) -> State:
        return State(self.body["status"])

    @property
    def host(self) -> HostRecord:
        return self.hosts[0]

    @property
    def title(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def project(self) -> str:
        return self.path.split("/")[1]

    @property
    def zone(self) -> str:
        return self.path.split("/")[3]

    @property
    def metadata(self) -> dict[str, str]:
        return {str(item["key"]): str(item.get("value", "")) for item in self.body.get("metadata", {}).get("items", [])}

    @property
    def startup_script(self) -> str:
        return self.metadata.get("startup-script", "")

    @property
    def chips_per_host(self) -> int:
        return 0


Machine = NodeRecord | InstanceRecord
"""Whatever has hosts."""


@dataclass
class QueuedRecord:
    """One queued resource: the message that the API shows, and what is behind it."""

    message: Any
    """Raw google.cloud.tpu.v2.QueuedResource."""
    operation: str
    """The operation that works on it, or did last."""
    entered: float
    """When it came into its state, seconds since the epoch."""

    @property
    def path(self) -> str:
        return str(self.message.name)

    @property
    def parent(self) -> str:
        return self.path.rpartition("/queuedResources/")[0]

    @property
    def zone(self) -> str:
        return self.path.split("/")[3]


def project_number(project: str) -> str:
    """A stable number for a project id, by which some answers name a project."""
    return str(100_000_000_000 + sum(ord(letter) * 131**index for index, letter in enumerate(project)) % 900_000_000_000)


def service_account(project: str) -> str:
    """The address of Compute Engine's default service account."""
    return f"{project_number(project)}-compute@developer.gserviceaccount.com"


def tpu_env(node: NodeRecord, worker: int) -> str:
    """The metadata attribute `tpu-env`: lines `KEY: 'value'`, as they were seen on TPU VMs."""
    chips, hosts = bounds(node.kind)
    values = {
        "ACCELERATOR_TYPE": node.kind.name,
        "TYPE": "V5LITE_POD" if node.kind.generation == "v5e" else node.kind.generation.upper(),
        "TOPOLOGY": node.kind.topology,
        "CHIPS_PER_HOST_BOUNDS": chips,
        "HOST_BOUNDS": hosts,
        "TPU_CHIPS_PER_PROCESS_BOUNDS": chips,
        "TPU_PROCESS_BOUNDS": hosts,
        "WORKER_ID": str(worker),
        "NODE_ID": node.node_id,
        "ZONE": node.zone,
        "PREEMPTIBLE": str(node.message.scheduling_config.spot or node.message.scheduling_config.preemptible).lower(),
        "RUNTIME_VERSION": node.message.runtime_version,
    }
    return "".join(f"{key}: '{value}'\n" for key, value in values.items())


def bounds(kind: AcceleratorType) -> tuple[str, str]:
    """CHIPS_PER_HOST_BOUNDS and HOST_BOUNDS: chips of a host and hosts of a slice along each axis (2,2,1 and 1,1,2 for v4-16)."""
    axes = [int(axis) for axis in kind.topology.split("x")]
    axes += [1] * (3 - len(axes))
    host = axes if kind.hosts == 1 else [2, 2, 1]
    assert math.prod(host) == kind.chips_per_host, kind
    return ",".join(map(str, host)), ",".join(str(axis // part) for axis, part in zip(axes, host, strict=True))
