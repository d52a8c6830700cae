"""The Cloud TPU v2 API through Google's own client: deadlines, retries, and errors of ours.

Every call has a deadline, since the client sets none. A call that is safe to repeat is repeated while the service stumbles; CreateNode
is repeated only after GetNode has said that the first try came to nothing, since v2 has no request id for it.
"""

import functools
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.tpu.catalog import AcceleratorType
from cluster.tpu.errors import DeadlineExceededError, NotFoundError, RateLimitedError, TPUError, TransientError, from_exception, from_status

if TYPE_CHECKING:
    from google.cloud.tpu_v2 import TpuClient

T = TypeVar("T")
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),  # 4 MiB by default; a longer list fails with RESOURCE_EXHAUSTED, which looks like quota
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),  # a service that comes back is found at once; the default goes up to two minutes
)


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
class Operation:
    """A long-running operation."""

    name: str
    done: bool
    error: TPUError | None
    """Why it failed; None while it runs and after success."""


class TpuApi:
    """Nodes of one project. Safe to use from several threads."""

    def __init__(
        self,
        endpoint: str | None,
        project: str,
        *,
        timeout: float = 30.0,
        patience: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
        client: "TpuClient | None" = None,
    ) -> None:
        """`endpoint`: host:port of a plaintext service, None for Google's own. `timeout`: seconds one try may take. `patience`: seconds
        after which a call is not repeated any more. `client`: a ready client instead of one made here.

        Raises PermissionDeniedError when Google's service is meant and there are no credentials.
        """
        self.project = project
        self._timeout, self._patience = timeout, patience
        self._clock, self._sleep, self._jitter = clock, sleep, jitter
        self._client = client if client is not None else make_client(endpoint, project)

    def close(self) -> None:
        """Close the connection; the object cannot be used after that."""
        self._client.transport.close()  # type: ignore[no-untyped-call]  # Google's client leaves it unannotated

    def create_node(self, zone: str, request: NodeRequest) -> str | None:
        """Ask for a node and return the operation's name at once.

        None: the answer was lost, but the node exists. Raises TPUError; AlreadyExistsError when the name is taken.
        """
        from google.cloud import tpu_v2

        call = tpu_v2.CreateNodeRequest(parent=self._parent(zone), node_id=request.node_id, node=_to_node(request))

        tries = 0

        def create() -> str | None:
            nonlocal tries
            tries += 1
            if tries > 1 and self._exists(zone, request.node_id):
                return None
            return str(self._client.create_node(call, timeout=self._timeout, retry=None).operation.name)

        return self._call(create, request.node_id, zone)

    def get_node(self, zone: str, name: str) -> Slice:
        """Raises NotFoundError when there is none, and other TPUErrors."""
        path = f"{self._parent(zone)}/nodes/{name}"
        return self._call(lambda: _to_slice(_raw(self._client.get_node(name=path, timeout=self._timeout, retry=None))), name, zone)

    def list_nodes(self, zone: str) -> list[Slice]:
        """All nodes of a zone. Complete, or a TPUError: a shorter list would make living slices look deleted."""
        slices: list[Slice] = []
        token = ""
        while True:
            page = self._call(functools.partial(self._list_page, zone, token), f"nodes of {self.project}", zone)
            slices += [_to_slice(node) for node in page.nodes]
            if page.unreachable:
                gone = ", ".join(page.unreachable)
                raise TransientError(f"the listing lacks {gone}", resource=f"nodes of {self.project}", zone=zone)
            token = page.next_page_token
            if not token:
                return slices

    def delete_node(self, zone: str, name: str) -> str:
        """Ask for the node's end and return the operation's name at once. Raises NotFoundError when there is none, and other TPUErrors."""
        path = f"{self._parent(zone)}/nodes/{name}"
        return self._call(lambda: str(self._client.delete_node(name=path, timeout=self._timeout, retry=None).operation.name), name, zone)

    def get_operation(self, name: str, *, resource: str, zone: str) -> Operation:
        """The state of an operation; errors in it name `resource`. Raises NotFoundError when it is unknown, and other TPUErrors."""
        raw = self._call(lambda: self._client.get_operation({"name": name}, timeout=self._timeout, retry=None), resource, zone)
        error = from_status(raw.error, resource=resource, zone=zone) if raw.HasField("error") else None
        return Operation(name, bool(raw.done), error)

    def _list_page(self, zone: str, token: str) -> Any:
        """One ListNodesResponse in raw protobuf, which reads five times faster than through proto-plus."""
        pager = self._client.list_nodes({"parent": self._parent(zone), "page_token": token}, timeout=self._timeout, retry=None)
        return _raw(next(iter(pager.pages)))

    def _exists(self, zone: str, name: str) -> bool:
        try:
            self.get_node(zone, name)
        except NotFoundError:
            return False
        return True

    def _call(self, call: Callable[[], T], resource: str, zone: str) -> T:
        """`call`, repeated while the service stumbles. Raises TPUError."""
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError

        deadline = self._clock() + self._patience
        pause = 0.25
        while True:
            try:
                return call()
            except (GoogleAPIError, GoogleAuthError) as raised:
                error = from_exception(raised, resource=resource, zone=zone)
                if not isinstance(error, TransientError | RateLimitedError | DeadlineExceededError) or self._clock() + pause > deadline:
                    raise error from raised
            self._sleep(pause * (0.5 + self._jitter() / 2))
            pause = min(pause * 2, 10.0)

    def _parent(self, zone: str) -> str:
        return f"projects/{self.project}/locations/{zone}"


def make_client(endpoint: str | None, project: str) -> "TpuClient":
    import grpc
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import tpu_v2  # a second to import, so only where a client is made
    from google.cloud.tpu_v2.services.tpu.transports import TpuGrpcTransport

    if endpoint is not None:
        return tpu_v2.TpuClient(transport=TpuGrpcTransport(channel=grpc.insecure_channel(endpoint, options=CHANNEL_OPTIONS)))
    try:
        return tpu_v2.TpuClient()
    except GoogleAuthError as error:
        raise from_exception(error, resource=f"project {project}") from error


def _raw(message: Any) -> Any:
    return type(message).pb(message)


def _to_node(request: NodeRequest) -> Any:
    """google.cloud.tpu.v2.Node for a request. A topology other than the type's own can only be said by accelerator_config."""
    from google.cloud import tpu_v2

    node = tpu_v2.Node(
        runtime_version=request.runtime_version,
        network_config=tpu_v2.NetworkConfig(
            network=request.network or "", subnetwork=request.subnetwork or "", enable_external_ips=request.external_ips
        ),
        scheduling_config=tpu_v2.SchedulingConfig(spot=request.spot, reserved=request.reserved),
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


_CONFIG_TYPE = {"v2": "V2", "v3": "V3", "v4": "V4", "v5e": "V5LITE_POD", "v5p": "V5P", "v6e": "V6E"}


def _to_slice(node: Any) -> Slice:
    """From a raw google.cloud.tpu.v2.Node."""
    states, healths = node.DESCRIPTOR.enum_types_by_name["State"], node.DESCRIPTOR.enum_types_by_name["Health"]
    state, health = states.values_by_number.get(node.state), healths.values_by_number.get(node.health)
    parts = node.name.split("/")
    return Slice(
        name=parts[-1],
        zone=parts[3],
        state=state.name if state is not None else "UNKNOWN",
        accelerator_type=node.accelerator_type,
        topology=node.accelerator_config.topology,
        hosts=tuple(endpoint.ip_address for endpoint in node.network_endpoints),
        labels=dict(node.labels),
        created=node.create_time.ToNanoseconds() / 1e9,
        health=health.name if health is not None else "HEALTH_UNSPECIFIED",
        health_description=node.health_description,
        spot=node.scheduling_config.spot or node.scheduling_config.preemptible,
    )
