"""Secret Manager and Compute Engine of the emulated cloud, against clients that know nothing of it: Google's own, and gcloud."""

from collections.abc import Iterator
from typing import Any

import google_crc32c
import grpc
import pytest
from google.api_core import exceptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import secretmanager_v1
from google.cloud.secretmanager_v1.services.secret_manager_service.transports import (
    SecretManagerServiceGrpcTransport,
    SecretManagerServiceRestTransport,
)

from cluster.emulator.embedded import Embedded, embedded_emulator
from cluster.emulator.faults import Fault

SECRET = "a payload that nobody may see"


@pytest.fixture
def emulator() -> Iterator[Embedded]:
    with embedded_emulator() as running:
        yield running


@pytest.fixture(params=["grpc", "rest"])
def secrets(request: pytest.FixtureRequest, emulator: Embedded) -> Iterator[secretmanager_v1.SecretManagerServiceClient]:
    transport: Any
    if request.param == "grpc":
        transport = SecretManagerServiceGrpcTransport(channel=grpc.insecure_channel(emulator.endpoint))
    else:
        host = emulator.rest.removeprefix("http://")
        credentials = AnonymousCredentials()  # type: ignore[no-untyped-call]
        transport = SecretManagerServiceRestTransport(host=host, credentials=credentials, url_scheme="http")
    yield secretmanager_v1.SecretManagerServiceClient(transport=transport)
    transport.close()


def make_secret(client: Any, name: str = "s", payload: str | None = SECRET, **labels: str) -> Any:
    body = {"replication": {"automatic": {}}, "labels": labels}
    made = client.create_secret({"parent": "projects/p", "secret_id": name, "secret": body}, timeout=20)
    if payload is not None:
        client.add_secret_version({"parent": made.name, "payload": {"data": payload.encode()}}, timeout=20)
    return made


def test_secret_lives_through_every_method(secrets: Any) -> None:
    made = make_secret(secrets, payload=None, owner="me")
    parts = made.name.split("/")
    assert (parts[0], parts[1].isdecimal(), parts[2:], dict(made.labels)) == ("projects", True, ["secrets", "s"], {"owner": "me"})
    assert secrets.get_secret(name="projects/p/secrets/s", timeout=20) == made
    assert secrets.get_secret(name=made.name, timeout=20) == made
    checksum = google_crc32c.value(SECRET.encode())
    first = secrets.add_secret_version({"parent": made.name, "payload": {"data": SECRET.encode(), "data_crc32c": checksum}}, timeout=20)
    assert (first.name, first.state.name, first.client_specified_payload_checksum) == (f"{made.name}/versions/1", "ENABLED", True)
    second = secrets.add_secret_version({"parent": made.name, "payload": {"data": b"later"}}, timeout=20)
    latest = secrets.access_secret_version(name="projects/p/secrets/s/versions/latest", timeout=20)
    assert (latest.name, latest.payload.data, latest.payload.data_crc32c) == (second.name, b"later", google_crc32c.value(b"later"))
    assert secrets.access_secret_version(name=first.name, timeout=20).payload.data == SECRET.encode()
    assert secrets.get_secret_version(name=first.name, timeout=20) == first
    assert secrets.destroy_secret_version(name=first.name, timeout=20).state.name == "DESTROYED"
    secrets.delete_secret(name=made.name, timeout=20)
    with pytest.raises(exceptions.NotFound, match=r"Secret \[projects/\d+/secrets/s\] not found"):
        secrets.get_secret(name=made.name, timeout=20)


def test_secrets_are_listed_in_pages_and_by_label(secrets: Any) -> None:
    for index in range(5):
        make_secret(secrets, f"s-{index}", payload=None, parity=str(index % 2), owner="me")
    make_secret(secrets, "another", payload=None)
    pager = secrets.list_secrets({"parent": "projects/p", "page_size": 4}, timeout=20)
    assert [len(page.secrets) for page in pager.pages] == [4, 2]
    found = secrets.list_secrets({"parent": "projects/p", "filter": "labels.owner=me AND labels.parity=1"}, timeout=20)
    assert [secret.name.rpartition("/")[2] for secret in found] == ["s-1", "s-3"]
    assert list(secrets.list_secrets(parent="projects/other", timeout=20)) == []


def test_secret_refusals_have_the_codes_of_the_service(secrets: Any, emulator: Embedded) -> None:
    made = make_secret(secrets)
    with pytest.raises(exceptions.Conflict, match=r"Secret \[.*\] already exists"):
        make_secret(secrets)
    with pytest.raises(exceptions.NotFound):
        secrets.access_secret_version(name="projects/p/secrets/none/versions/latest", timeout=20)
    with pytest.raises(exceptions.NotFound, match=r"Secret Version \[.*/versions/7\] not found"):
        secrets.access_secret_version(name=f"{made.name}/versions/7", timeout=20)
    with pytest.raises(exceptions.BadRequest, match="checksum"):
        secrets.add_secret_version({"parent": made.name, "payload": {"data": b"x", "data_crc32c": 1}}, timeout=20)
    secrets.destroy_secret_version(name=f"{made.name}/versions/1", timeout=20)
    with pytest.raises(exceptions.BadRequest, match="is in DESTROYED state"):
        secrets.access_secret_version(name=f"{made.name}/versions/latest", timeout=20)
    emulator.cloud.faults.add(Fault.from_dict({"preset": "secrets-permission", "method": "AccessSecretVersion"}))
    with pytest.raises(exceptions.Forbidden, match=r"secretmanager\.versions\.access"):
        secrets.access_secret_version(name=f"{made.name}/versions/latest", timeout=20)
    assert secrets.get_secret(name=made.name, timeout=20) == made


def test_faults_of_cloud_tpu_do_not_strike_other_services(secrets: Any, emulator: Embedded) -> None:
    for preset in ("quota", "permission", "api-disabled"):
        emulator.cloud.faults.add(Fault.from_dict({"preset": preset}))
    make_secret(secrets)
