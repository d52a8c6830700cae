"""The emulated cloud as a daemon with real host processes, through Google's own client."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.api_core.exceptions import AlreadyExists, InvalidArgument, NotFound, ServiceUnavailable
from google.api_core.future.polling import POLLING_PREDICATE
from google.api_core.retry import Retry
from google.cloud import tpu_v2
from google.cloud.tpu_v2.services.tpu.transports import TpuGrpcTransport

from cluster.errors import ClusterError
from cluster.local import LocalEndpoints, emulator_status, ensure_emulator, stop_emulator
from cluster.state import emulator_dir

PARENT = "projects/my-project/locations/us-central2-b"
# Writes what the host finds around it, then stays.
SCRIPT = """
ask() { curl -sf -H 'Metadata-Flavor: Google' "http://$GCE_METADATA_HOST/computeMetadata/v1/instance/attributes/$1"; }
{ ask agent-worker-number; echo; ask worker-network-endpoints; echo; ask instance-id; echo; ask colour; echo; } > "$HOME/answers"
"$PODLAUNCH_HOME/bin/python" -c 'import cluster, os, json; print(json.dumps(dict(os.environ)))' > "$HOME/environment"
cat "$PODLAUNCH_HOME/bundle.sha256" > "$HOME/bundle"
(setsid sleep 1234.5 &)
touch "$HOME/done"
exec sleep 1234.5
"""


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("SECRET_OF_THE_USER", "must not reach a host")
    yield tmp_path / "state"
    stop_emulator()
    assert not sleepers(tmp_path)


@pytest.fixture
def client(state: Path) -> Iterator[tpu_v2.TpuClient]:  # the state directory must be the test's own first
    channel = grpc.insecure_channel(ensure_emulator("cafe").grpc, options=[("grpc.max_reconnect_backoff_ms", 200)])
    yield tpu_v2.TpuClient(transport=TpuGrpcTransport(channel=channel))
    channel.close()


def sleepers(folder: Path) -> list[psutil.Process]:
    """The processes of hosts whose disks lie under `folder`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and str(folder) in process.environ().get("HOME", ""):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def disks() -> list[Path]:
    return sorted((emulator_dir() / "hosts").iterdir(), key=lambda disk: disk.name.rpartition("-")[2])


def answers(client: tpu_v2.TpuClient) -> bool:
    try:
        client.list_nodes(parent=PARENT, timeout=5)
    except ServiceUnavailable:
        return False
    return True


def booted() -> bool:
    """Whether both hosts have done all that the script does before it stays."""
    return len(disks()) == 2 and all((disk / "home" / "done").exists() for disk in disks())


def finish(operation: Any) -> Any:
    return operation.result(timeout=30, polling=Retry(predicate=POLLING_PREDICATE, initial=0.05, maximum=0.5, timeout=30))


def create(client: tpu_v2.TpuClient, node_id: str = "mine-0", script: str = SCRIPT) -> Any:
    node = tpu_v2.Node(
        accelerator_type="v4-16", runtime_version="tpu-ubuntu2204-base", metadata={"startup-script": script, "colour": "green"}
    )
    operation = client.create_node(parent=PARENT, node_id=node_id, node=node, timeout=10)
    return finish(operation)


def test_node_has_two_hosts_that_know_who_they_are_and_delete_leaves_no_process(client: tpu_v2.TpuClient, state: Path) -> None:
    node = create(client)
    assert node.state == tpu_v2.Node.State.READY
    ips = [endpoint.ip_address for endpoint in node.network_endpoints]
    assert len(ips) == 2
    wait(booted)
    for worker, disk in enumerate(disks()):
        answers = (disk / "home" / "answers").read_text().splitlines()
        assert answers == [str(worker), ",".join(ips), "mine-0", "green"]
        env = json.loads((disk / "home" / "environment").read_text())
        assert env["GCE_METADATA_HOST"].startswith(f"{ips[worker]}:")
        assert (env["PODLAUNCH_STATE_DIR"], env["JAX_PLATFORMS"], env["PYTHONSAFEPATH"]) == (str(state), "cpu", "1")
        assert len(env["TMPDIR"]) < 40
        assert not {"SECRET_OF_THE_USER", "TPU_NAME", "TPU_WORKER_ID"} & env.keys()
        assert (disk / "home" / "bundle").read_text() == "cafe"
    assert len(sleepers(state)) == 4  # a host's own and the one that left its session

    finish(client.delete_node(name=node.name, timeout=10))
    assert sleepers(state) == []
    assert disks() == []
    with pytest.raises(NotFound, match="was not found"):
        client.get_node(name=node.name, timeout=10)


def test_kill_of_the_daemon_keeps_nodes_hosts_and_addresses(client: tpu_v2.TpuClient, state: Path) -> None:
    before = create(client)
    running = emulator_status()
    assert running is not None
    wait(booted)
    hosts = {process.pid for process in sleepers(state)}
    os.kill(running.pid, signal.SIGKILL)
    wait(lambda: emulator_status() is None)
    assert ensure_emulator("cafe") == LocalEndpoints(running.endpoint, running.rest)
    wait(lambda: answers(client))
    assert client.get_node(name=before.name, timeout=10) == before
    assert {process.pid for process in sleepers(state)} >= hosts
    environment = next(process.environ() for process in sleepers(state))
    asked = [
        "curl",
        "-sf",
        "-H",
        "Metadata-Flavor: Google",
        f"http://{environment['GCE_METADATA_HOST']}/computeMetadata/v1/project/project-id",
    ]
    assert subprocess.run(asked, capture_output=True, check=True, timeout=10, text=True).stdout == "my-project"


def test_ended_host_is_not_revived_while_the_daemon_watches(client: tpu_v2.TpuClient) -> None:
    create(client, script="exit 3")
    log = emulator_dir().parent / "logs" / "emulator.log"
    wait(lambda: log.read_text().count("its startup script has ended") == 2)
    running = emulator_status()
    assert running is not None
    os.kill(running.pid, signal.SIGKILL)
    wait(lambda: emulator_status() is None)
    ensure_emulator("cafe")
    wait(lambda: answers(client))
    assert log.read_text().count("boots at") == 2
    assert client.get_node(name=f"{PARENT}/nodes/mine-0", timeout=10).state == tpu_v2.Node.State.READY


def test_new_bundle_replaces_the_daemon_and_keeps_hosts(client: tpu_v2.TpuClient, state: Path) -> None:
    create(client)
    wait(booted)
    hosts = {process.pid for process in sleepers(state)}
    old = emulator_status()
    ensure_emulator("beef")
    new = emulator_status()
    assert old is not None
    assert new is not None
    assert (new.image_bundle, new.endpoint, new.pid != old.pid) == ("beef", old.endpoint, True)
    assert {process.pid for process in sleepers(state)} >= hosts


def test_second_daemon_on_the_same_folder_is_refused(client: tpu_v2.TpuClient) -> None:
    wait(lambda: answers(client))
    argv = [sys.executable, "-m", "cluster.emulator", "--state-dir", str(emulator_dir())]
    second = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert second.returncode == 1
    assert "another emulated cloud runs" in second.stderr


def test_refusals_reach_the_client_as_its_own_exceptions(client: tpu_v2.TpuClient) -> None:
    create(client, script="")
    with pytest.raises(AlreadyExists):
        create(client, script="")
    with pytest.raises(InvalidArgument, match="nodeId"):
        create(client, node_id="Mine")
    wrong = tpu_v2.Node(accelerator_type="v4-17", runtime_version="tpu-ubuntu2204-base")
    with pytest.raises(InvalidArgument, match="was not found in zone us-central2-b"):
        client.create_node(parent=PARENT, node_id="x", node=wrong, timeout=10)


def test_lists_come_in_pages(client: tpu_v2.TpuClient) -> None:
    for index in range(3):
        create(client, node_id=f"n-{index}", script="")
    pager = client.list_nodes({"parent": PARENT, "page_size": 2}, timeout=10)
    assert [len(page.nodes) for page in pager.pages] == [2, 1]
    assert "v4-16" in [kind.type_ for kind in client.list_accelerator_types(parent=PARENT, timeout=10)]
    assert "v2-alpha-tpuv6e" in [version.version for version in client.list_runtime_versions(parent=PARENT, timeout=10)]


def test_stop_emulator_ends_hosts_of_a_dead_daemon_too(client: tpu_v2.TpuClient, state: Path) -> None:
    create(client)
    wait(booted)
    running = emulator_status()
    assert running is not None
    os.kill(running.pid, signal.SIGKILL)
    wait(lambda: emulator_status() is None)
    assert sleepers(state)
    assert stop_emulator()
    assert sleepers(state) == []
    assert not stop_emulator()


@pytest.mark.usefixtures("state")
def test_emulator_that_cannot_start_says_why() -> None:
    (emulator_dir() / "cloud.sqlite3").mkdir()
    with pytest.raises(ClusterError, match=r"ended at once: .*; see .*emulator-output.log"):
        ensure_emulator("cafe")
    (emulator_dir() / "cloud.sqlite3").rmdir()


def test_daemon_does_not_import_ray_or_jax() -> None:
    code = "import sys, cluster.emulator.__main__ as m; print(sorted({'ray', 'jax', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "[]"
