"""Secrets of a project in Secret Manager: made, read and deleted by name. Nothing here logs or shows a payload."""

import functools
import random
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cluster.cloud_errors import AlreadyExistsError, NotFoundError, Rule, Service, TransientError, UnknownError, from_exception
from cluster.credentials import default_credentials
from cluster.repeat import CHANNEL_OPTIONS, Repeater

if TYPE_CHECKING:
    from google.cloud.secretmanager_v1 import SecretManagerServiceClient

SECRET_MANAGER = Service(
    "Secret Manager",
    "secretmanager.googleapis.com",
    "roles/secretmanager.admin",
    next_steps={
        NotFoundError: "list what exists: gcloud secrets list",
        AlreadyExistsError: "delete it if nobody needs it (gcloud secrets delete NAME), or choose another cluster name",
    },
    rules=(Rule(r"is in (DESTROYED|DISABLED) state", NotFoundError, "give it a new version: gcloud secrets versions add NAME"),),
)


class SecretStore:
    """The secrets of one project. Safe to use from several threads."""

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
        client: "SecretManagerServiceClient | None" = None,
    ) -> None:
        """`endpoint`: host:port of a plaintext gRPC service, None for Google's own. `timeout`: seconds one try may take. `patience`:
        seconds after which a call is not repeated any more. `client`: a ready client instead of one made here.

        Raises CredentialsError when Google's service is meant and there are no credentials, or none that work.
        """
        self.project = project
        self._timeout = timeout
        self._repeater = Repeater(SECRET_MANAGER, patience=patience, clock=clock, sleep=sleep, jitter=jitter)
        self._client = client if client is not None else _make_client(endpoint, project)

    def close(self) -> None:
        """Close the connection; the object cannot be used after that."""
        self._client.transport.close()  # type: ignore[no-untyped-call]  # Google's client leaves it unannotated

    def create(self, name: str, value: bytes | str, labels: Mapping[str, str]) -> None:
        """Store `value` (at most 64 KiB) under `name`; where a secret of that name has the same labels, as its newest version.

        Raises AlreadyExistsError when one with other labels is there, which is not ours then, and other CloudErrors.
        """
        import google_crc32c

        data = value.encode() if isinstance(value, str) else value
        secret = {"replication": {"automatic": {}}, "labels": dict(labels)}
        try:
            self._call(self._client.create_secret, {"parent": self._parent, "secret_id": name, "secret": secret}, name)
        except AlreadyExistsError:
            self._check_ours(name, labels)
        payload = {"data": data, "data_crc32c": google_crc32c.value(data)}
        self._call(self._client.add_secret_version, {"parent": self._path(name), "payload": payload}, name)

    def read(self, name: str) -> str:
        """The newest version, as text. Raises NotFoundError when there is none, and other CloudErrors."""
        import google_crc32c

        answer = self._call(self._client.access_secret_version, {"name": f"{self._path(name)}/versions/latest"}, name)
        data = bytes(answer.payload.data)
        if google_crc32c.value(data) != answer.payload.data_crc32c:
            raise TransientError("what arrived is not what was stored: the checksums differ", service=SECRET_MANAGER, resource=name)
        try:
            return data.decode()
        except UnicodeDecodeError:
            # Not chained: that exception holds the payload.
            raise UnknownError("it is not text", service=SECRET_MANAGER, resource=name) from None

    def delete(self, name: str) -> bool:
        """Delete it with all of its versions; whether there was one. Raises CloudError."""
        try:
            self._call(self._client.delete_secret, {"name": self._path(name)}, name)
        except NotFoundError:
            return False
        return True

    def list(self, labels: Mapping[str, str]) -> "list[str]":
        """The names of the secrets that have all of `labels`. Raises CloudError."""
        return list(self.list_labels(labels))

    def list_labels(self, labels: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """The same, each with all of its labels."""
        found: dict[str, dict[str, str]] = {}
        call = {"parent": self._parent, "filter": " AND ".join(f"labels.{key}={value}" for key, value in labels.items())}
        while True:
            page = self._call(functools.partial(_page, self._client.list_secrets), call, f"secrets of {self.project}")
            named = {secret.name.rpartition("/")[2]: dict(secret.labels) for secret in page.secrets}
            found |= {name: own for name, own in named.items() if labels.items() <= own.items()}
            if not page.next_page_token:
                return found
            call["page_token"] = page.next_page_token

    def _check_ours(self, name: str, labels: Mapping[str, str]) -> None:
        found = dict(self._call(self._client.get_secret, {"name": self._path(name)}, name).labels)
        if found != dict(labels):
            shown = ", ".join(f"{key}={value}" for key, value in sorted(found.items())) or "none"
            raise AlreadyExistsError(f"its labels are not those of this cluster: {shown}", service=SECRET_MANAGER, resource=name)

    def _call(self, method: Callable[..., Any], request: Mapping[str, Any], name: str) -> Any:
        return self._repeater.call(lambda: method(request, timeout=self._timeout, retry=None), f"secret {name}")

    @property
    def _parent(self) -> str:
        return f"projects/{self.project}"

    def _path(self, name: str) -> str:
        return f"{self._parent}/secrets/{name}"


def _page(method: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    return next(iter(method(*arguments, **more).pages))


def _make_client(endpoint: str | None, project: str) -> "SecretManagerServiceClient":
    import grpc
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import secretmanager_v1  # half a second to import, so only where a client is made
    from google.cloud.secretmanager_v1.services.secret_manager_service.transports import SecretManagerServiceGrpcTransport

    if endpoint is not None:
        channel = grpc.insecure_channel(endpoint, options=CHANNEL_OPTIONS)
        return secretmanager_v1.SecretManagerServiceClient(transport=SecretManagerServiceGrpcTransport(channel=channel))
    try:
        return secretmanager_v1.SecretManagerServiceClient(credentials=default_credentials())
    except GoogleAuthError as error:
        raise from_exception(error, service=SECRET_MANAGER, resource=f"project {project}") from error
