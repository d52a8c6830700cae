"""Secret Manager and Compute Engine of the emulated cloud, against clients that know nothing of it: Google's own, and gcloud."""

import json
import os
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import grpc
import pytest
from google.api_core import exceptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import compute_v1, secretmanager_v1
from google.cloud.secretmanager_v1.services.secret_manager_service.transports import (
    SecretManagerServiceGrpcTransport,
    SecretManagerServiceRestTransport,
)

from cluster.emulator.embedded import Embedded, embedded_emulator
from cluster.emulator.faults import Effect, Fault

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
    pager = secrets.list_secret_versions({"parent": made.name, "page_size": 1}, timeout=20)
    assert [[version.name for version in page.versions] for page in pager.pages] == [[second.name], [first.name]]
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


ZONE = "us-central1-a"
IMAGE = "projects/debian-cloud/global/images/family/debian-12"
WHERE = {"project": "p", "zone": ZONE}


@pytest.fixture
def instances(emulator: Embedded) -> Iterator[compute_v1.InstancesClient]:
    yield from connect(compute_v1.InstancesClient, emulator)


@pytest.fixture
def operations(emulator: Embedded) -> Iterator[compute_v1.ZoneOperationsClient]:
    yield from connect(compute_v1.ZoneOperationsClient, emulator)


def connect(kind: Any, emulator: Embedded) -> Iterator[Any]:
    credentials = AnonymousCredentials()  # type: ignore[no-untyped-call]
    client = kind(credentials=credentials, client_options={"api_endpoint": emulator.rest})
    yield client
    client.transport.close()


def body(name: str = "n", **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "machine_type": f"zones/{ZONE}/machineTypes/e2-standard-4",
        "disks": [
            {
                "boot": True,
                "auto_delete": True,
                "initialize_params": {"source_image": IMAGE},
            }
        ],
        "network_interfaces": [{"access_configs": [{"name": "External NAT"}]}],
        **more,
    }


def insert(client: Any, operations: Any, name: str = "n", *, request_id: str = "", zone: str = ZONE, **more: Any) -> Any:
    resource = body(name, **{"machine_type": f"zones/{zone}/machineTypes/e2-standard-4", **more})
    call: dict[str, Any] = {"project": "p", "zone": zone, "instance_resource": resource}
    began = client.insert_unary({**call, **({"request_id": request_id} if request_id else {})}, timeout=20)
    return operations.wait({"project": "p", "zone": zone, "operation": began.name}, timeout=130)


def test_instance_lives_through_every_method(instances: Any, operations: Any) -> None:
    metadata = {"items": [{"key": "colour", "value": "green"}]}
    more: dict[str, Any] = {"scheduling": {"preemptible": True}, "tags": {"items": ["t"]}}
    account = {"email": "default", "scopes": ["https://www.googleapis.com/auth/cloud-platform"]}
    done = insert(
        instances,
        operations,
        labels={"owner": "me"},
        metadata=metadata,
        service_accounts=[account],
        **more,
    )
    assert (done.status.name, done.operation_type, done.progress, list(done.error.errors)) == ("DONE", "insert", 100, [])
    assert operations.get({**WHERE, "operation": done.name}, timeout=20) == done
    found = instances.get({**WHERE, "instance": "n"}, timeout=20)
    assert (found.name, found.status, dict(found.labels), found.id) == ("n", "RUNNING", {"owner": "me"}, done.target_id)
    assert found.zone.endswith(f"/projects/p/zones/{ZONE}")
    assert found.machine_type.endswith(f"/zones/{ZONE}/machineTypes/e2-standard-4")
    assert [(item.key, item.value) for item in found.metadata.items] == [("colour", "green")]
    assert (found.scheduling.preemptible, found.scheduling.provisioning_model, list(found.tags.items)) == (True, "STANDARD", ["t"])
    assert found.service_accounts[0].email.endswith("-compute@developer.gserviceaccount.com")
    assert found.disks[0].initialize_params.source_image.endswith("debian-12")
    interface = found.network_interfaces[0]
    assert interface.network_i_p.startswith("127.")
    assert interface.access_configs[0].nat_i_p == interface.network_i_p
    assert list(instances.list(project="p", zone=ZONE, timeout=20)) == [found]
    ended = instances.delete_unary({**WHERE, "instance": "n"}, timeout=20)
    assert operations.wait({**WHERE, "operation": ended.name}, timeout=130).status.name == "DONE"
    with pytest.raises(exceptions.NotFound, match=r"The resource 'projects/p/zones/us-central1-a/instances/n' was not found") as caught:
        instances.get({**WHERE, "instance": "n"}, timeout=20)
    assert caught.value.errors[0]["reason"] == "notFound"


def test_instances_of_all_zones_come_in_pages_with_a_warning_for_empty_zones(instances: Any, operations: Any) -> None:
    for index, zone in enumerate((ZONE, ZONE, "us-east5-a")):
        insert(instances, operations, f"n-{index}", zone=zone, labels={"parity": str(index % 2), "owner": "me"})
    insert(instances, operations, "other")
    pages = list(instances.aggregated_list({"project": "p", "max_results": 3}, timeout=20).pages)
    assert [sum(len(part.instances) for part in page.items.values()) for page in pages] == [3, 1]
    scopes = dict(instances.aggregated_list({"project": "p", "filter": "labels.owner=me AND labels.parity=0"}, timeout=20))
    assert [one.name for one in scopes[f"zones/{ZONE}"].instances] == ["n-0"]
    assert [one.name for one in scopes["zones/us-east5-a"].instances] == ["n-2"]
    assert scopes["zones/us-east1-d"].warning.code == "NO_RESULTS_ON_PAGE"
    assert [one.name for one in instances.list({**WHERE, "filter": "labels.owner:* AND name != n-1"}, timeout=20)] == ["n-0"]
    with pytest.raises(exceptions.BadRequest, match="Invalid list filter expression"):
        list(instances.list({**WHERE, "filter": "labels.owner>me"}, timeout=20))


def test_request_id_makes_one_instance_and_its_name_is_taken(instances: Any, operations: Any) -> None:
    first = insert(instances, operations, request_id="6c0e0b1a-0000-4000-8000-000000000001")
    assert insert(instances, operations, request_id="6c0e0b1a-0000-4000-8000-000000000001").name == first.name
    with pytest.raises(exceptions.Conflict, match="already exists") as caught:
        insert(instances, operations)
    assert caught.value.errors[0]["reason"] == "alreadyExists"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"name": "N"}, "'resource.name'"),
        ({"machine_type": "e2-standard-4"}, "'resource.machineType': 'e2-standard-4'. The URL is malformed"),
        ({"machine_type": "zones/us-east5-a/machineTypes/e2-standard-4"}, "must be in the zone of the instance"),
        ({"disks": []}, "No disks are specified"),
        ({"network_interfaces": []}, "At least one network interface is required"),
        ({"labels": {"Owner": "me"}}, "LABEL_KEY"),
        ({"metadata": {"items": [{"key": "big", "value": "x" * 300_000}]}}, "resource.metadata.items"),
    ],
)
def test_insert_refuses_what_the_service_would_refuse(instances: Any, operations: Any, more: dict[str, Any], words: str) -> None:
    with pytest.raises(exceptions.BadRequest) as caught:
        insert(instances, operations, **more)
    assert words in str(caught.value)


def test_compute_faults_come_as_the_service_words_them(instances: Any, operations: Any, emulator: Embedded) -> None:
    faults = emulator.cloud.faults
    faults.add(Fault.from_dict({"preset": "compute-stockout", "count": 1}))
    done = insert(instances, operations)
    assert (done.error.errors[0].code, done.http_error_status_code) == ("ZONE_RESOURCE_POOL_EXHAUSTED", 503)
    assert f"projects/p/zones/{ZONE}" in done.error.errors[0].message
    assert list(instances.list(project="p", zone=ZONE, timeout=20)) == []
    for preset, reason in (
        ("compute-quota", "quotaExceeded"),
        ("compute-permission", "forbidden"),
        ("compute-api-disabled", "accessNotConfigured"),
    ):
        faults.add(Fault.from_dict({"preset": preset, "count": 1}))
        with pytest.raises(exceptions.Forbidden) as caught:
            insert(instances, operations)
        assert caught.value.errors[0]["reason"] == reason
    faults.add(Fault(Effect.DROP_ANSWER, "instances.insert", count=1))
    with pytest.raises(OSError, match="without response"):
        insert(instances, operations)
    with pytest.raises(exceptions.Conflict):
        insert(instances, operations)


def test_wait_answers_when_the_operation_ends(instances: Any, operations: Any, emulator: Embedded) -> None:
    emulator.cloud.faults.add(Fault(Effect.HANG, "instances.insert", count=1))
    began = instances.insert_unary({**WHERE, "instance_resource": body()}, timeout=20)
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(operations.wait({**WHERE, "operation": began.name}, timeout=60)))
    waiting.start()
    assert operations.get({**WHERE, "operation": began.name}, timeout=20).status.name == "RUNNING"
    instances.delete_unary({**WHERE, "instance": "n"}, timeout=20)
    waiting.join(timeout=30)
    assert answers[0].status.name == "DONE"
    assert answers[0].error.errors[0].code == "RESOURCE_OPERATION_ABORTED"


def test_unreachable_zone_fails_the_list_of_all_unless_a_part_is_taken(instances: Any, operations: Any, emulator: Embedded) -> None:
    insert(instances, operations)
    emulator.cloud.set_reachable(ZONE, False)
    with pytest.raises(exceptions.ServiceUnavailable, match=ZONE):
        list(instances.aggregated_list({"project": "p"}, timeout=20, retry=None))
    url = f"{emulator.rest}/compute/v1/projects/p/aggregated/instances?returnPartialSuccess=true"  # only gcloud asks for it
    with urllib.request.urlopen(url, timeout=20) as answer:
        page = json.loads(answer.read())
    assert page["items"][f"zones/{ZONE}"]["warning"]["code"] == "UNREACHABLE"
    assert [place.rpartition("/")[2] for place in page["unreachables"]] == [ZONE]


class Gcloud:
    """The real gcloud, pointed at the emulated services by its own settings."""

    def __init__(self, program: str, emulator: Embedded, folder: Path) -> None:
        self._program = program
        self._env = {
            **os.environ,
            "CLOUDSDK_CONFIG": str(folder),
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"{emulator.rest}/compute/v1/",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER": f"{emulator.rest}/",
            "CLOUDSDK_CORE_PROJECT": "p",
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "1",
        }

    def text(self, *words: str, stdin: str = "") -> str:
        argv = [self._program, *words]
        done = subprocess.run(argv, env=self._env, input=stdin, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def __call__(self, *words: str, stdin: str = "") -> Any:
        return json.loads(self.text(*words, "--format", "json", stdin=stdin) or "null")


@pytest.fixture
def gcloud(emulator: Embedded, tmp_path: Path) -> Gcloud:
    program = shutil.which("gcloud")
    if program is None:
        assert os.environ.get("CI") != "true", "gcloud is missing; CI has to have it"
        pytest.skip("gcloud is not installed on this machine")
    return Gcloud(program, emulator, tmp_path)


def test_gcloud_lists_describes_and_deletes_instances(gcloud: Gcloud, instances: Any, operations: Any) -> None:
    insert(instances, operations, labels={"owner": "me"})
    insert(instances, operations, "other", zone="us-east5-a")
    assert {one["name"] for one in gcloud("compute", "instances", "list")} == {"n", "other"}
    assert [one["name"] for one in gcloud("compute", "instances", "list", "--filter", "labels.owner=me")] == ["n"]
    described = gcloud("compute", "instances", "describe", "n", "--zone", ZONE)
    assert (described["status"], described["labels"]) == ("RUNNING", {"owner": "me"})
    gcloud("compute", "instances", "delete", "n", "--zone", ZONE)
    assert [one["name"] for one in gcloud("compute", "instances", "list")] == ["other"]


def test_gcloud_makes_reads_lists_and_deletes_a_secret(gcloud: Gcloud) -> None:
    gcloud("secrets", "create", "s", "--labels", "owner=me", "--data-file", "-", stdin=SECRET)
    assert gcloud.text("secrets", "versions", "access", "latest", "--secret", "s") == SECRET
    assert [one["labels"] for one in gcloud("secrets", "list")] == [{"owner": "me"}]
    assert gcloud("secrets", "describe", "s")["name"].endswith("/secrets/s")
    gcloud("secrets", "delete", "s")
    assert gcloud("secrets", "list") == []
