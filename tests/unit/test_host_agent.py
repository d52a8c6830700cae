"""What a host makes of its metadata, and how its Ray is kept alive."""

import itertools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster.errors import ClusterError
from cluster.secret_place import SecretPlace
from cluster.vm.bootstrap import startup_script
from cluster.vm.host_agent import host_environment, ray_start_command
from cluster.vm.metadata import HostIdentity, read_identity
from cluster.vm.ray_process import RayProcess, restart_delays
from cluster.vm.settings import HostSettings

SETTINGS = HostSettings("c", "10.0.0.9:6379", SecretPlace(file="/state/token"), "v4-16", "podlaunch-slice-v4-16", 4)
METADATA = {
    "instance/attributes/agent-worker-number": "1\n",
    "instance/attributes/worker-network-endpoints": "unknown:1:10.0.0.1,unknown:2:10.0.0.2",
    "instance/attributes/instance-id": "mine-0",
    "instance/attributes/accelerator-type": "v4-16",
    "instance/attributes/tpu-env": "ACCELERATOR_TYPE: 'v4-16'\nTOPOLOGY: '2x2x2'\nWORKER_ID: '1'\n",
}


def fetcher(values: Mapping[str, str]) -> object:
    return values.__getitem__


@pytest.mark.parametrize("endpoints", ["unknown:1:10.0.0.1,unknown:2:10.0.0.2", "10.0.0.1,10.0.0.2"])
def test_identity_is_read_from_the_old_and_the_new_form_of_endpoints(endpoints: str) -> None:
    identity = read_identity(({**METADATA, "instance/attributes/worker-network-endpoints": endpoints}).__getitem__)
    assert identity == HostIdentity("mine-0", 1, ("10.0.0.1", "10.0.0.2"), "v4-16", "2x2x2")
    assert identity.ip == "10.0.0.2"


@pytest.mark.parametrize("worker", ["", "none", "2", "-1"])
def test_a_missing_or_impossible_worker_id_never_becomes_zero(worker: str) -> None:
    with pytest.raises(ClusterError, match="calls this host worker"):
        read_identity(({**METADATA, "instance/attributes/agent-worker-number": worker}).__getitem__)


@pytest.mark.parametrize("worker", [0, 1])
def test_only_worker_0_carries_the_autoscalers_instance_and_the_slices_resource(worker: int) -> None:
    identity = HostIdentity("mine-0", worker, ("10.0.0.1", "10.0.0.2"), "v4-16", "2x2x2")
    leaked = {"RAY_CLOUD_INSTANCE_ID": "the-head", "RAY_NODE_TYPE_NAME": "head", "MEGASCALE_SLICE_ID": "7", "PATH": "/bin"}
    env = host_environment(identity, SETTINGS, Path("/state/token"), leaked)
    assert env.get("RAY_CLOUD_INSTANCE_ID") == ("mine-0" if worker == 0 else None)
    assert "MEGASCALE_SLICE_ID" not in env
    assert (env["RAY_AUTH_MODE"], env["RAY_AUTH_TOKEN_PATH"], env["PATH"]) == ("token", "/state/token", "/bin")
    assert (env["TPU_NAME"], env["TPU_WORKER_ID"], env["TPU_TOPOLOGY"]) == ("mine-0", str(worker), "2x2x2")
    command = ray_start_command(identity, SETTINGS, Path("/tmp/x"))
    (resources,) = [json.loads(word.split("=", 1)[1]) for word in command if word.startswith("--resources=")]
    assert resources == {"TPU": 4} | ({"podlaunch-slice-v4-16": 1} if worker == 0 else {})


def test_restart_delays_grow_to_a_limit() -> None:
    assert list(itertools.islice(restart_delays(), 7)) == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_ray_is_started_again_until_the_end_is_asked_for() -> None:
    starts: list[int] = []
    waited: list[float] = []

    def start() -> "subprocess.Popen[bytes]":
        starts.append(1)
        return subprocess.Popen([sys.executable, "-c", "pass"])

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        return len(starts) == 3

    RayProcess(start, wait).run(iter([1.0, 2.0, 4.0]))
    assert (len(starts), waited) == (3, [1.0, 2.0, 4.0])


def test_the_end_reaches_a_living_ray_as_sigterm() -> None:
    started = threading.Event()
    processes: list[subprocess.Popen[bytes]] = []

    def start() -> "subprocess.Popen[bytes]":
        processes.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        started.set()
        return processes[-1]

    ray = RayProcess(start, lambda _: True)
    thread = threading.Thread(target=ray.run, args=(iter([0.0]),))
    thread.start()
    assert started.wait(20)
    while processes[0].poll() is None:  # `start` has not returned to `ray` yet when the event is set
        ray.end()
        thread.join(0.05)
    thread.join(20)
    assert processes[0].returncode == -signal.SIGTERM


def run_script(home: Path, bundle: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-c", startup_script(bundle)], env={"PODLAUNCH_HOME": str(home)}, capture_output=True, text=True, timeout=20
    )


def test_the_startup_script_runs_the_agent_of_a_matching_image_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    (tmp_path / "bundle.sha256").write_text("abc\n")
    assert run_script(tmp_path, "abc").stdout == "-m cluster.vm.host_agent\n"
    other = run_script(tmp_path, "def")
    assert other.returncode == 1
    assert "holds the bundle 'abc', the cluster wants 'def'" in other.stderr
