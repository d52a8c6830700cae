"""`tpu emulator`: the daemon, its real host processes and what befalls them, through the command line."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.api_core import exceptions
from google.cloud import tpu_v2
from google.cloud.tpu_v2.services.tpu.transports import TpuGrpcTransport

from cluster.local import ask_emulator, stop_emulator

PARENT = "projects/p/locations/us-central2-b"
# Writes down the notice that it gets, then stays.
SCRIPT = """
url="http://$GCE_METADATA_HOST/computeMetadata/v1/instance/preempted"
touch "$HOME/booted"
curl -sf -H 'Metadata-Flavor: Google' "$url?wait_for_change=true" > "$HOME/notice"
exec sleep 1234.5
"""


def tpu(*words: str) -> "subprocess.CompletedProcess[str]":
    program = str(Path(sys.executable).parent / "tpu")
    return subprocess.run([program, "emulator", *words], capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)


def said(*words: str) -> str:
    done = tpu(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path / "state"))
    yield tmp_path / "state"
    stop_emulator()


@pytest.fixture
def endpoints(state: Path) -> dict[str, str]:  # the state directory must be the test's own first
    found = json.loads(said("start", "--profile", "instant", "--json"))
    assert isinstance(found, dict)
    return found


@pytest.fixture
def client(endpoints: dict[str, str]) -> Iterator[tpu_v2.TpuClient]:
    channel = grpc.insecure_channel(endpoints["grpc"])
    yield tpu_v2.TpuClient(transport=TpuGrpcTransport(channel=channel))
    channel.close()


def create(client: tpu_v2.TpuClient) -> Any:
    node = tpu_v2.Node(accelerator_type="v4-16", runtime_version="tpu-ubuntu2204-base", metadata={"startup-script": SCRIPT})
    return finish(client.create_node(parent=PARENT, node_id="n", node=node, timeout=10))


def finish(operation: Any) -> Any:
    return operation.result(timeout=30)


def wait(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def hosts(state: Path) -> list[psutil.Process]:
    """The startup scripts of the hosts, in no order."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and str(state) in process.environ().get("HOME", ""):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_preempted_node_warns_its_hosts_then_ends_them(client: tpu_v2.TpuClient, state: Path) -> None:
    create(client)
    disks = state / "emulator" / "hosts"
    wait(lambda: len(list(disks.glob("*/home/booted"))) == 2)
    wait(lambda: len(hosts(state)) == 4)  # a shell and its curl on each: both wait for the change
    said("preempt", "n", "--notice", "600")
    wait(lambda: [path.read_text() for path in disks.glob("*/home/notice")] == ["TRUE", "TRUE"])
    assert client.get_node(name=f"{PARENT}/nodes/n").state == tpu_v2.Node.State.READY
    before = float(said("clock"))
    assert float(said("clock", "--advance", "600")) >= before + 600
    wait(lambda: hosts(state) == [])
    assert client.get_node(name=f"{PARENT}/nodes/n").state == tpu_v2.Node.State.PREEMPTED
    assert json.loads(said("status", "--json"))["nodes"][0]["state"] == "PREEMPTED"
    finish(client.delete_node(name=f"{PARENT}/nodes/n", timeout=10))
    assert not list(disks.iterdir())


def test_host_stands_still_wakes_dies_and_boots_again(client: tpu_v2.TpuClient, state: Path) -> None:
    create(client)
    wait(lambda: len(hosts(state)) == 4)

    def statuses() -> list[str]:
        return sorted(process.status() for process in hosts(state))

    ask_emulator("POST", "/host", {"node": "n", "worker": 1, "action": "hang"})
    wait(lambda: statuses().count(psutil.STATUS_STOPPED) == 2)
    ask_emulator("POST", "/host", {"node": "n", "worker": 1, "action": "wake"})
    wait(lambda: statuses().count(psutil.STATUS_STOPPED) == 0)
    ask_emulator("POST", "/host", {"node": "n", "worker": 1, "action": "kill"})
    wait(lambda: len(hosts(state)) == 2)
    wait(lambda: [host["exited"] for host in ask_emulator("GET", "/nodes")[0]["hosts"]] == [False, True])
    assert client.get_node(name=f"{PARENT}/nodes/n").state == tpu_v2.Node.State.READY
    ask_emulator("POST", "/host", {"node": "n", "worker": 1, "action": "boot"})
    wait(lambda: len(hosts(state)) == 4)


def test_fault_strikes_until_it_is_cleared(client: tpu_v2.TpuClient) -> None:
    number = said("fault", "permission", "--zone", "us-central2-*").strip()
    assert json.loads(said("status", "--json"))["faults"][number]["code"] == 7
    with pytest.raises(exceptions.PermissionDenied, match=r"tpu\.nodes\.get"):
        client.get_node(name=f"{PARENT}/nodes/n", timeout=10)
    said("fault", "--clear")
    with pytest.raises(exceptions.NotFound):
        client.get_node(name=f"{PARENT}/nodes/n", timeout=10)


def test_wrong_use_is_told_with_what_there_is(state: Path) -> None:
    for words, expected, code in (
        (("preempt", "n"), "start one with: tpu emulator start", 1),
        (("fault", "none"), "there is no preset 'none'", 2),
        (("start", "--profile", "none"), "known: instant, realistic", 2),
        (("stop",), "no emulated cloud runs", 0),
    ):
        done = tpu(*words)
        assert (done.returncode, expected in " ".join((done.stdout + done.stderr).split())) == (code, True), done
