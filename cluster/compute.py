"""Virtual machines of a project on Compute Engine, through Google's own client: made, seen, deleted.

That client speaks REST and takes three seconds to import, which nobody pays who makes no `Instances`.
"""

import functools
import random
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.cloud_errors import (
    DeadlineExceededError,
    NotFoundError,
    NotInZoneError,
    QuotaError,
    Rule,
    Service,
    StockoutError,
    TransientError,
    classify,
    from_exception,
)
from cluster.credentials import default_credentials
from cluster.repeat import STUMBLES, Repeater

if TYPE_CHECKING:
    from google.cloud.compute_v1 import InstancesClient, ZoneOperationsClient

T = TypeVar("T")
COMPUTE_ENGINE = Service(
    "Compute Engine",
    "compute.googleapis.com",
    "roles/compute.instanceAdmin.v1 (and roles/iam.serviceAccountUser on the VM's service account)",
    next_steps={
        NotFoundError: "list what exists: gcloud compute instances list",
        StockoutError: "add zones to the configuration, try again later, or use another machine type",
        NotInZoneError: "choose another zone, or a machine type that this one has (gcloud compute machine-types list --zones ZONE)",
    },
    # Codes and reasons of Compute Engine's errors (docs: "Troubleshooting resource errors", "API errors").
    rules=(
        Rule(r"ZONE_RESOURCE_POOL_EXHAUSTED|does not have enough resources available", StockoutError),
        Rule(r"QUOTA_EXCEEDED|\bquotaExceeded\b|quota '[^']*' exceeded", QuotaError),
        Rule(r"machine type [^ ]+ does not exist in zone|Unknown zone", NotInZoneError),
        Rule(r"resourceNotReady|is not ready", TransientError),
    ),
)
_WAIT_S = 120.0
"""The service answers a wait after two minutes at the latest (docs: zoneOperations.wait)."""
_HTTP_CODES = {400: 3, 401: 16, 403: 7, 404: 5, 409: 6, 412: 9, 429: 8, 500: 13, 503: 14}
"""google.rpc.Code of the HTTP status that an operation ends with."""


@dataclass(frozen=True)
class Instance:
    """One virtual machine as the service shows it."""

    name: str
    zone: str
    status: str
    """PROVISIONING, STAGING, RUNNING, STOPPING, STOPPED, TERMINATED, SUSPENDING, SUSPENDED, REPAIRING or PENDING_STOP."""
    ip: str
    """In its network; empty until it has one."""
    external_ip: str
    """Empty when it has none."""
    labels: Mapping[str, str]
    created: float
    """Seconds since the epoch."""
    metadata: Mapping[str, str] = field(default_factory=dict)


class Instances:
    """The instances of one project. Safe to use from several threads."""

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
        client: "InstancesClient | None" = None,
        operations: "ZoneOperationsClient | None" = None,
        new_id: Callable[[], str] = lambda: str(uuid.uuid4()),
    ) -> None:
        """`endpoint`: URL of a service that wants no credentials, None for Google's own. `timeout`: seconds one try may take.
        `patience`: seconds after which a call is not repeated any more. `client`, `operations`: ready clients. `new_id`: makes request ids.

        Raises CredentialsError when Google's service is meant and there are no credentials, or none that work.
        """
        from google.cloud import compute_v1

        self.project = project
        self._timeout, self._clock, self._new_id = timeout, clock, new_id
        self._repeater = Repeater(COMPUTE_ENGINE, patience=patience, clock=clock, sleep=sleep, jitter=jitter)
        self._client: Any = client if client is not None else _make(compute_v1.InstancesClient, endpoint, project)
        # One of our own: the operation that the client's insert() returns asks Google's endpoint, whatever endpoint the client has.
        self._operations: Any = operations if operations is not None else _make(compute_v1.ZoneOperationsClient, endpoint, project)

    def close(self) -> None:
        """Close the connections; the object cannot be used after that."""
        self._client.transport.close()
        self._operations.transport.close()

    def insert(self, zone: str, spec: Mapping[str, Any]) -> str:
        """Ask for an instance and return the operation's name at once, for `wait_operation`.

        `spec`: the instance as the REST API has it ({"name": .., "machineType": .., "disks": [..], ..}). However often it has to be
        repeated, one is made. Raises CloudError; AlreadyExistsError when the name is taken.
        """
        from google.cloud import compute_v1
        from google.protobuf import json_format

        resource = compute_v1.Instance()
        json_format.ParseDict(dict(spec), compute_v1.Instance.pb(resource))
        call = compute_v1.InsertInstanceRequest(project=self.project, zone=zone, instance_resource=resource, request_id=self._new_id())
        # The rate is the caller's to keep: a creation that is too early is not repeated here.
        return str(self._call(self._client.insert_unary, call, resource.name, zone, repeat=STUMBLES).name)

    def get(self, zone: str, name: str) -> Instance | None:
        """None when there is none. Raises CloudError."""
        try:
            return _instance(self._call(self._client.get, {"project": self.project, "zone": zone, "instance": name}, name, zone))
        except NotFoundError:
            return None

    def list(self, labels: Mapping[str, str]) -> "list[Instance]":
        """The instances of all zones that have all of `labels`. Complete, or a CloudError: a shorter list would hide what still costs."""
        call = {"project": self.project, "filter": " AND ".join(f"labels.{key}={value}" for key, value in labels.items())}
        what = f"instances of {self.project}"
        found: list[Instance] = []
        while True:
            page = self._call(functools.partial(_page, self._client.aggregated_list), call, what)
            down = [*page.unreachables, *(scope for scope, part in page.items.items() if part.warning.code == "UNREACHABLE")]
            if down:
                raise TransientError(f"the listing lacks {', '.join(down)}", service=COMPUTE_ENGINE, resource=what)
            every = (_instance(one) for part in page.items.values() for one in part.instances)
            found += [one for one in every if labels.items() <= one.labels.items()]
            if not page.next_page_token:
                return sorted(found, key=lambda one: (one.zone, one.name))
            call["page_token"] = page.next_page_token

    def delete(self, zone: str, name: str) -> bool:
        """Ask for its end, which takes a while, and return whether there was one. Raises CloudError."""
        call = {"project": self.project, "zone": zone, "instance": name, "request_id": self._new_id()}
        try:
            self._call(self._client.delete_unary, call, name, zone)
        except NotFoundError:
            return False
        return True

    def wait_operation(self, zone: str, operation: str, timeout: float) -> None:
        """Until the operation has ended well. Raises DeadlineExceededError after `timeout` seconds, or what it ends with."""
        from google.cloud import compute_v1

        deadline = self._clock() + timeout
        call = {"project": self.project, "zone": zone, "operation": operation}
        while (left := deadline - self._clock()) > 0:
            try:
                found = self._call(self._operations.wait, call, operation, zone, timeout=min(left, _WAIT_S) + 1.0, repeat=(TransientError,))
            except DeadlineExceededError:
                continue  # ours, which is a little shorter than the service's
            if found.status == compute_v1.Operation.Status.DONE:
                _check(found, zone)
                return
        words = f"the operation has not ended after {timeout:.0f} s"
        raise DeadlineExceededError(words, service=COMPUTE_ENGINE, resource=operation, zone=zone)

    def _call(
        self, method: Callable[..., T], request: Any, resource: str, zone: str | None = None, *, timeout: float | None = None, **more: Any
    ) -> T:
        limit = self._timeout if timeout is None else timeout
        return self._repeater.call(lambda: method(request, timeout=limit, retry=None), resource, zone, **more)


def _check(operation: Any, zone: str) -> None:
    """Raises the CloudError that the operation ended with."""
    if not operation.error.errors:
        return
    name = operation.target_link.rpartition("/")[2]
    words = "; ".join(part.message or part.code for part in operation.error.errors)
    codes = [part.code for part in operation.error.errors]
    code = _HTTP_CODES.get(operation.http_error_status_code)
    raise classify(code, words, service=COMPUTE_ENGINE, resource=name, zone=zone, operation=True, reasons=codes)


def _instance(raw: Any) -> Instance:
    interface = raw.network_interfaces[0] if raw.network_interfaces else None
    access = interface.access_configs[0] if interface is not None and interface.access_configs else None
    return Instance(
        name=raw.name,
        zone=raw.zone.rpartition("/")[2],
        status=raw.status,
        ip=interface.network_i_p if interface is not None else "",
        external_ip=access.nat_i_p if access is not None else "",
        labels=dict(raw.labels),
        created=datetime.fromisoformat(raw.creation_timestamp).timestamp(),
        metadata={item.key: item.value for item in raw.metadata.items},
    )


def _page(method: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    return next(iter(method(*arguments, **more).pages))


def _make(kind: Callable[..., Any], endpoint: str | None, project: str) -> Any:
    from google.auth.credentials import AnonymousCredentials
    from google.auth.exceptions import GoogleAuthError

    if endpoint is not None:
        made: Any = kind(credentials=AnonymousCredentials(), client_options={"api_endpoint": endpoint})  # type: ignore[no-untyped-call]
        made.transport._session.trust_env = False  # a service on loopback is never reached through a proxy
        return made
    try:
        return kind(credentials=default_credentials())
    except GoogleAuthError as error:
        raise from_exception(error, service=COMPUTE_ENGINE, resource=f"project {project}") from error
