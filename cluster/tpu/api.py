"""The Cloud TPU v2 API through Google's own client: deadlines, retries, and errors of ours.

Every call has a deadline, since the client sets none. A call that is safe to repeat is repeated while the service stumbles. A creation is
repeated only after a look has said that the first try came to nothing (CreateNode has no request id in v2; a queued resource has one, and
the look tells besides that a try whose answer was lost has succeeded).
"""

import functools
import random
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from cluster.credentials import default_credentials
from cluster.repeat import CHANNEL_OPTIONS, SAFE, STUMBLES, Repeater
from cluster.tpu.errors import CLOUD_TPU, InvalidRequestError, NotFoundError, TransientError, from_exception, from_status
from cluster.tpu.messages import (
    NodeRequest,
    Operation,
    QueuedRequest,
    QueuedResource,
    Slice,
    raw,
    to_node,
    to_queued,
    to_queued_resource,
    to_slice,
)

if TYPE_CHECKING:
    from google.cloud.tpu_v2 import TpuClient

__all__ = ["ALL_ZONES", "Listing", "NodeRequest", "Operation", "QueuedRequest", "QueuedResource", "Slice", "TpuApi", "make_client"]
T = TypeVar("T")
P = TypeVar("P", Slice, QueuedResource)
ALL_ZONES = "-"
"""In a listing: every zone at once."""


@dataclass(frozen=True)
class Listing(Generic[P]):
    """What the zones that answered hold."""

    what: str
    """For errors."""
    items: list[P]
    unreachable: frozenset[str | None]
    """The zones that did not answer, of which nothing is in `items`; None: one that cannot be told, so it may be any."""

    def complete(self, needed: Collection[str] | None = None) -> list[P]:
        """Raises TransientError when a zone that is `needed` (None: every one) has not answered."""
        gone = sorted(place or "some zone" for place in self.unreachable if needed is None or place is None or place in needed)
        if gone:
            raise TransientError(f"the listing lacks {', '.join(gone)}", resource=self.what)
        return self.items


class TpuApi:
    """Nodes and queued resources of one project. Safe to use from several threads."""

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
        new_id: Callable[[], str] = lambda: str(uuid.uuid4()),
    ) -> None:
        """`endpoint`: host:port of a plaintext service, None for Google's own. `timeout`: seconds one try may take. `patience`: seconds
        after which a call is not repeated any more. `client`: a ready client instead of one made here. `new_id`: makes request ids.

        Raises CredentialsError when Google's service is meant and there are no credentials, or none that work.
        """
        self.project = project
        self._timeout = timeout
        self._repeater = Repeater(CLOUD_TPU, patience=patience, clock=clock, sleep=sleep, jitter=jitter)
        self._new_id = new_id
        self._client = client if client is not None else make_client(endpoint, project)

    def close(self) -> None:
        """Close the connection; the object cannot be used after that."""
        self._client.transport.close()  # type: ignore[no-untyped-call]  # Google's client leaves it unannotated

    def create_node(self, zone: str, request: NodeRequest) -> str | None:
        """Ask for a node and return the operation's name at once.

        None: the answer was lost, but the node exists. Raises TPUError; AlreadyExistsError when the name is taken.
        """
        from google.cloud import tpu_v2

        call = tpu_v2.CreateNodeRequest(parent=self._parent(zone), node_id=request.node_id, node=to_node(request))
        return self._create(self._client.create_node, call, lambda: self.get_node(zone, request.node_id), request.node_id, zone)

    def get_node(self, zone: str, name: str) -> Slice:
        """Raises NotFoundError when there is none, and other TPUErrors."""
        path = f"{self._parent(zone)}/nodes/{name}"
        return self._call(lambda: to_slice(raw(self._client.get_node(name=path, timeout=self._timeout, retry=None))), name, zone)

    def guest_attribute(self, zone: str, name: str, attribute: str) -> list[str]:
        """The values of `namespace/key` that hosts of a node have published about themselves. Raises TPUError, NotFoundError when there is
        no such node.
        """
        call = {"name": f"{self._parent(zone)}/nodes/{name}", "query_path": attribute}
        ask = self._client.get_guest_attributes
        try:
            answer = self._call(lambda: raw(ask(call, timeout=self._timeout, retry=None)), name, zone)
        except InvalidRequestError:  # what the service says when nothing was published: The "GuestAttributes" value "" was not found.
            return []
        return [item.value for host in answer.guest_attributes for item in host.query_value.items]

    def list_nodes(self, zone: str, needed: Collection[str] | None = None) -> list[Slice]:
        """All nodes of a zone, or of ALL_ZONES. Complete, or a TPUError: a shorter list would make living slices look deleted.

        `needed`: the zones that have to be complete; None: every one.
        """
        return self.look_at_nodes(zone).complete(needed)

    def look_at_nodes(self, zone: str) -> Listing[Slice]:
        """All nodes of a zone, or of ALL_ZONES, as far as the zones answer. Raises TPUError when a page is missing."""
        what = f"nodes of {self.project}"
        pages = list(self._pages(self._client.list_nodes, what, zone))
        return _listing(what, pages, [to_slice(node) for page in pages for node in page.nodes])

    def delete_node(self, zone: str, name: str) -> str:
        """Ask for the node's end and return the operation's name at once. Raises NotFoundError when there is none, and other TPUErrors."""
        path = f"{self._parent(zone)}/nodes/{name}"
        return self._call(lambda: str(self._client.delete_node(name=path, timeout=self._timeout, retry=None).operation.name), name, zone)

    def create_queued_resource(self, zone: str, request: QueuedRequest) -> str | None:
        """Ask for a queued resource with one node, both of the same name, and return the operation's name at once.

        None: the answer was lost, but the queued resource exists. Raises TPUError; AlreadyExistsError when the name is taken.
        """
        from google.cloud import tpu_v2

        name, parent = request.node.node_id, self._parent(zone)
        call = tpu_v2.CreateQueuedResourceRequest(
            parent=parent,
            queued_resource_id=name,
            queued_resource=to_queued_resource(parent, request),
            request_id=self._new_id(),  # one for all tries of this creation, another for the next one of the same name
        )
        return self._create(self._client.create_queued_resource, call, lambda: self.get_queued_resource(zone, name), name, zone)

    def get_queued_resource(self, zone: str, name: str) -> QueuedResource:
        """Raises NotFoundError when there is none, and other TPUErrors."""
        call = {"name": f"{self._parent(zone)}/queuedResources/{name}"}
        get = self._client.get_queued_resource
        return self._call(lambda: to_queued(raw(get(call, timeout=self._timeout, retry=None))), name, zone)

    def list_queued_resources(self, zone: str, needed: Collection[str] | None = None) -> list[QueuedResource]:
        """All queued resources, as `list_nodes` does it for nodes."""
        return self.look_at_queued_resources(zone).complete(needed)

    def look_at_queued_resources(self, zone: str) -> Listing[QueuedResource]:
        """All queued resources, as `look_at_nodes` does it for nodes."""
        what = f"queued resources of {self.project}"
        pages = list(self._pages(self._client.list_queued_resources, what, zone))
        return _listing(what, pages, [to_queued(queued) for page in pages for queued in page.queued_resources])

    def delete_queued_resource(self, zone: str, name: str, *, force: bool = True) -> str:
        """Ask for its end and return the operation's name at once. `force`: with its node, whatever the state.

        Raises NotFoundError when there is none, and other TPUErrors.
        """
        call = {"name": f"{self._parent(zone)}/queuedResources/{name}", "force": force, "request_id": self._new_id()}
        delete = self._client.delete_queued_resource
        return self._call(lambda: str(delete(call, timeout=self._timeout, retry=None).operation.name), name, zone)

    def get_operation(self, name: str, *, resource: str, zone: str) -> Operation:
        """The state of an operation; errors in it name `resource`. Raises NotFoundError when it is unknown, and other TPUErrors."""
        raw = self._call(lambda: self._client.get_operation({"name": name}, timeout=self._timeout, retry=None), resource, zone)
        error = from_status(raw.error, resource=resource, zone=zone) if raw.HasField("error") else None
        return Operation(name, bool(raw.done), error)

    def _create(self, method: Callable[..., Any], call: Any, look: Callable[[], object], name: str, zone: str) -> str | None:
        tries = 0

        def create() -> str | None:
            nonlocal tries
            tries += 1
            if tries > 1 and _exists(look):
                return None
            return str(method(call, timeout=self._timeout, retry=None).operation.name)

        # The rate is the caller's to keep: a creation that is too early is not repeated here.
        return self._call(create, name, zone, repeat=STUMBLES)

    def _pages(self, method: Callable[..., Any], what: str, zone: str) -> Iterator[Any]:
        """The raw answers, page by page. Raises TPUError when one cannot be had."""
        token = ""
        while True:
            page = self._call(functools.partial(self._page, method, zone, token), what, zone)
            yield page
            token = page.next_page_token
            if not token:
                return

    def _page(self, method: Callable[..., Any], zone: str, token: str) -> Any:
        pager = method({"parent": self._parent(zone), "page_token": token}, timeout=self._timeout, retry=None)
        return raw(next(iter(pager.pages)))

    def _call(self, call: Callable[[], T], resource: str, zone: str, repeat: tuple[type[Exception], ...] = SAFE) -> T:
        return self._repeater.call(call, resource, zone, repeat)

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
        return tpu_v2.TpuClient(credentials=default_credentials())
    except GoogleAuthError as error:
        raise from_exception(error, resource=f"project {project}") from error


def _exists(look: Callable[[], object]) -> bool:
    try:
        look()
    except NotFoundError:
        return False
    return True


def _listing(what: str, pages: list[Any], items: list[P]) -> Listing[P]:
    """A zone may fall silent between two pages: then what the first one has of it is not all."""
    unreachable = frozenset(_zone_of(place) for page in pages for place in page.unreachable)
    return Listing(what, [item for item in items if item.zone not in unreachable], unreachable)


def _zone_of(place: str) -> str | None:
    """The zone that an entry of `unreachable` names, as a path or by itself; None when it cannot be told, so it may be any."""
    name = place.rpartition("/")[2]
    return name if re.fullmatch(r"[a-z]+-[a-z]+[0-9]+-[a-z]", name) else None
