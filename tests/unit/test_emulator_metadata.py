"""The metadata server of an emulated host."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.cloud import tpu_v2

from cluster.emulator.guest import GuestAttributes
from cluster.emulator.metadata import MetadataServer, entries
from cluster.emulator.model import HostRecord, NodeRecord
from cluster.tpu.catalog import lookup


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    message = tpu_v2.Node.pb()(
        name="projects/my-project/locations/us-central2-b/nodes/mine-0",
        runtime_version="tpu-ubuntu2204-base",
        metadata={"startup-script": "echo hi", "podlaunch-head": "10.0.0.1", "enable-guest-attributes": "TRUE"},
        scheduling_config={"spot": True},
    )
    node = NodeRecord(message, "0123456789ab", lookup("v4-16"), [HostRecord(0, "127.99.1.1"), HostRecord(1, "127.99.1.2")])
    running = MetadataServer("127.99.1.2", 0, entries(node, 1), GuestAttributes(tmp_path / "guest.json"))
    yield f"http://127.99.1.2:{running.port}/computeMetadata/v1/"
    running.stop()


def ask(url: str, flavor: str | None = "Google", *, method: str = "GET", body: bytes | None = None) -> str:
    headers = {"Metadata-Flavor": flavor} if flavor is not None else {}
    request = urllib.request.Request(url, headers=headers, method=method, data=body)
    with urllib.request.urlopen(request, timeout=5) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("instance/attributes/accelerator-type", "v4-16"),
        ("instance/attributes/agent-worker-number", "1"),
        ("instance/attributes/instance-id", "mine-0"),
        ("instance/attributes/worker-network-endpoints", "127.99.1.1,127.99.1.2"),
        ("instance/attributes/startup-script", "echo hi"),
        ("instance/attributes/podlaunch-head", "10.0.0.1"),
        ("instance/name", "t1v-n-01234567-w-1"),
        ("instance/preempted", "FALSE"),
        ("instance/maintenance-event", "NONE"),
        ("project/project-id", "my-project"),
    ],
)
def test_key_has_the_value_that_a_tpu_vm_shows(server: str, key: str, value: str) -> None:
    assert ask(server + key) == value


def test_tpu_env_has_the_lines_of_a_tpu_vm(server: str) -> None:
    lines = ask(server + "instance/attributes/tpu-env").splitlines()
    assert {"TOPOLOGY: '2x2x2'", "WORKER_ID: '1'", "HOST_BOUNDS: '1,1,2'", "NODE_ID: 'mine-0'", "PREEMPTIBLE: 'true'"} <= set(lines)


def test_zone_is_named_by_project_number(server: str) -> None:
    project, number, zones, zone = ask(server + "instance/zone").split("/")
    assert (project, number.isdecimal(), zones, zone) == ("projects", True, "zones", "us-central2-b")


def test_directory_lists_its_keys_and_recursive_gives_json(server: str) -> None:
    assert "agent-worker-number" in ask(server + "instance/attributes/").splitlines()
    assert "attributes/" in ask(server + "instance/").splitlines()
    everything = json.loads(ask(server + "instance/attributes/?recursive=true"))
    assert everything["instance-id"] == "mine-0"


@pytest.mark.parametrize(("key", "flavor", "status"), [("instance/name", None, 403), ("instance/name", "x", 403), ("none", "Google", 404)])
def test_wrong_flavor_is_forbidden_and_unknown_key_not_found(server: str, key: str, flavor: str | None, status: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(server + key, flavor)
    assert caught.value.code == status
    caught.value.close()


def test_host_publishes_words_about_itself_and_takes_them_back(server: str, tmp_path: Path) -> None:
    url = server + "instance/guest-attributes/podlaunch/trouble"
    ask(url, method="PUT", body=b"worker 1: no")
    assert ask(url) == "worker 1: no"
    assert GuestAttributes(tmp_path / "guest.json").values() == {"podlaunch/trouble": "worker 1: no"}, "kept on the host's disk"
    ask(url, method="DELETE")
    for name, code in (("podlaunch/trouble", 404), ("podlaunch", 404), ("a/b/c", 404)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(server + "instance/guest-attributes/" + name, method="GET")
        assert caught.value.code == code
        caught.value.close()


def test_nothing_is_published_where_the_metadata_does_not_allow_it(tmp_path: Path) -> None:
    message = tpu_v2.Node.pb()(name="projects/p/locations/z/nodes/n")
    node = NodeRecord(message, "0123456789ab", lookup("v4-8"), [HostRecord(0, "127.99.1.3")])
    guest = GuestAttributes(tmp_path / "guest.json")
    running = MetadataServer("127.99.1.3", 0, entries(node, 0), guest)
    url = f"http://127.99.1.3:{running.port}/computeMetadata/v1/instance/guest-attributes/podlaunch/trouble"
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(url, method="PUT", body=b"no")
    running.stop()
    assert (caught.value.code, guest.values()) == (403, {})
    caught.value.close()
