"""`cluster.existing`: a TPU VM that somebody made elsewhere joins the cluster, and is left as it was found. gcloud is a stub that reaches
the emulator's hosts; everything else is real.
"""

import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.cloud import tpu_v2
from google.cloud.tpu_v2.services.tpu.transports import TpuGrpcTransport

from tests.compilations import share_compilations
from tests.integration.conftest import Home, eventually

pytestmark = pytest.mark.timeout(400)
PARENT = "projects/podlaunch-emulated/locations/us-central2-b"
# Takes what the real one takes, runs the command on every host, and writes down that it was called.
GCLOUD = """#!{python}
import json, subprocess, sys
words = sys.argv[1:]
assert words[:5] == ["compute", "tpus", "tpu-vm", "ssh", "theirs"], words
assert {{"--project=podlaunch-emulated", "--zone=us-central2-b", "--worker=all", "--quiet"}} <= set(words), words
(command,) = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
open("{calls}", "a").write("called\\n")
nodes = json.loads(subprocess.run(["{tpu}", "emulator", "status", "--json"], capture_output=True, check=True).stdout)["nodes"]
for worker in range(len(nodes[0]["hosts"])):
    subprocess.run(["{tpu}", "emulator", "run", "theirs", str(worker), command], check=True)
"""


class WithGcloud(Home):
    @property
    def env(self) -> dict[str, str]:
        return {**super().env, "PATH": f"{self.folder}/bin:{super().env['PATH']}"}


@pytest.fixture
def home() -> Iterator[WithGcloud]:
    base = Path(tempfile.mkdtemp(prefix="podlaunch-test-"))
    share_compilations(base / "cache")
    made = WithGcloud(base / "work", base / "state")
    (made.folder / "bin").mkdir(parents=True)
    tool = made.folder / "bin" / "gcloud"
    names = {"python": sys.executable, "tpu": Path(sys.executable).parent / "tpu", "calls": made.folder / "calls"}
    tool.write_text(GCLOUD.format(**names))
    tool.chmod(0o755)
    yield made
    made.tpu("stop", "-y", limit=120)
    made.tpu("emulator", "stop", "-y", limit=60)
    left = made.processes()
    for process in left:
        process.send_signal(signal.SIGKILL)
    shutil.rmtree(base)
    assert left == []


@pytest.fixture
def client(home: WithGcloud) -> Iterator[tpu_v2.TpuClient]:
    endpoint = json.loads(home.tpu("emulator", "start", "--profile", "instant", "--json").stdout)["grpc"]
    channel = grpc.insecure_channel(endpoint)
    client = tpu_v2.TpuClient(transport=TpuGrpcTransport(channel=channel))
    node = tpu_v2.Node(accelerator_type="v4-16", runtime_version="tpu-ubuntu2204-base", metadata={"colour": "green"})
    made: Any = client.create_node(parent=PARENT, node_id="theirs", node=node, timeout=10)
    made.result(timeout=30)
    yield client
    channel.close()


def cloud(process: psutil.Process) -> bool:
    """Whether it is the emulated cloud or the object storage beside it."""
    words = process.cmdline()
    return "cluster.emulator" in words or "fake-gcs-server" in words[0]


def slices(home: WithGcloud) -> dict[str, Any]:
    rows = json.loads(home.tpu("status", "--json").stdout)
    return {one["name"]: one for row in rows for one in row["slices"]}


@pytest.mark.long
def test_existing_slice_joins_runs_and_is_left_as_it_was(home: WithGcloud, client: tpu_v2.TpuClient) -> None:
    before = client.get_node(name=f"{PARENT}/nodes/theirs", timeout=10)
    wrong = home.tpu("start", "-y", "existing=[theirs]", "accelerator_type=v4-8")
    assert (wrong.returncode, "'theirs' is a v4-16 (2x2x2), the cluster is of v4-8 (2x2x1)" in wrong.stderr) == (2, True), wrong
    missing = home.tpu("start", "-y", "existing=[thiers]")
    assert (missing.returncode, "there is no TPU VM 'thiers' in us-central2-b" in missing.stderr) == (2, True), missing
    assert json.loads(home.tpu("status", "--json").stdout) == []

    # An idle limit of a second: Ray must not end it for being idle.
    started = home.tpu("start", "-y", "existing=[theirs]", "idle_minutes=0.02")
    assert started.returncode == 0, started.stderr
    eventually(lambda: slices(home).get("theirs", {}).get("hosts_ready") == 2, "both hosts joined", limit=120)
    assert slices(home)["theirs"]["existing"] is True
    assert "existing" in home.tpu("status").stdout
    run = home.launch("trainer=debug", "run.name=mine", "cluster.existing=[theirs]", "trainer.steps=3")  # 2 hosts of 4 chips
    assert run.returncode == 0, run.stdout + run.stderr
    assert list(slices(home)) == ["theirs"], "the run used it, and no slice was made"
    again = home.tpu("start", "-y", "existing=[theirs]")
    assert again.returncode == 0, again.stderr
    assert (home.folder / "calls").read_text() == "called\n", "hosts that have joined are left alone"

    stopped = home.tpu("stop", "-y")
    assert stopped.returncode == 0, stopped.stderr
    assert client.get_node(name=f"{PARENT}/nodes/theirs", timeout=10) == before
    assert not any("podlaunch" in str(path) for path in (home.state / "emulator" / "hosts").glob("*/home/.podlaunch/*"))
    eventually(lambda: all(cloud(process) for process in home.processes()), "nothing runs but the emulated cloud", limit=30)
