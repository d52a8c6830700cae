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
from typer.testing import CliRunner

from cluster.errors import ConfigError
from cluster.local import stop_emulator
from launcher.cli.main import app

PARENT = "projects/p/locations/us-central2-b"
# Writes down the notice that it gets, then stays. The tag is of what it knows: nothing is missed between two requests.
SCRIPT = """
url="http://$GCE_METADATA_HOST/computeMetadata/v1/instance/preempted"
curl -sf -D "$HOME/headers" -o /dev/null -H 'Metadata-Flavor: Google' "$url"
tag=$(sed -n 's/^ETag: \\([^\\r]*\\).*/\\1/p' "$HOME/headers")
touch "$HOME/booted"
curl -sf -H 'Metadata-Flavor: Google' "$url?wait_for_change=true&last_etag=$tag" > "$HOME/notice"
exec sleep 1234.5
"""


def tpu(*words: str) -> "subprocess.CompletedProcess[str]":
    program = str(Path(sys.executable).parent / "tpu")
    return subprocess.run([program, "emulator", *words], capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)


def said(*words: str) -> str:
    """The same in this process, which spares the second that a program takes to start."""
    done = CliRunner().invoke(app, ["emulator", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
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


def up(state: Path) -> None:
    """A shell and its curl on each of the node's two hosts: both wait for the change."""
    wait(lambda: len(list((state / "emulator" / "hosts").glob("*/home/booted"))) == 2)
    wait(lambda: len(hosts(state)) == 4)


def test_preempted_node_warns_its_hosts_then_ends_them(client: tpu_v2.TpuClient, state: Path) -> None:
    create(client)
    disks = state / "emulator" / "hosts"
    up(state)
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
    up(state)

    def statuses() -> list[str]:
        return sorted(process.status() for process in hosts(state))

    said("host", "hang", "n", "1")
    wait(lambda: statuses().count(psutil.STATUS_STOPPED) == 2)
    said("host", "resume", "n", "1")
    wait(lambda: statuses().count(psutil.STATUS_STOPPED) == 0)
    said("host", "kill", "n", "1")
    wait(lambda: len(hosts(state)) == 2)
    wait(lambda: [host["exited"] for host in json.loads(said("status", "--json"))["nodes"][0]["hosts"]] == [False, True])
    assert client.get_node(name=f"{PARENT}/nodes/n").state == tpu_v2.Node.State.READY
    said("host", "boot", "n", "1")
    wait(lambda: len(hosts(state)) == 4)


def test_slow_boot_keeps_one_host_back_until_its_time(client: tpu_v2.TpuClient, state: Path) -> None:
    said("host", "slow-boot", "n", "1", "--seconds", "600")
    create(client)
    wait(lambda: len(hosts(state)) == 2)
    assert [host["held"] for host in json.loads(said("status", "--json"))["nodes"][0]["hosts"]] == [False, True]
    said("clock", "--advance", "600")
    wait(lambda: len(hosts(state)) == 4)


def test_maintenance_ends_the_hosts_and_brings_them_back(client: tpu_v2.TpuClient, state: Path) -> None:
    create(client)
    wait(lambda: len(hosts(state)) == 4)
    said("maintenance", "n", "--notice", "0")
    wait(lambda: client.get_node(name=f"{PARENT}/nodes/n").state == tpu_v2.Node.State.REPAIRING and hosts(state) == [])

    def later() -> bool:
        said("clock", "--advance", "60")  # more than once: its end is promised only after the last host has ended
        return bool(client.get_node(name=f"{PARENT}/nodes/n").state == tpu_v2.Node.State.READY and len(hosts(state)) == 4)

    wait(later)


def test_limits_are_set_shown_and_removed(client: tpu_v2.TpuClient) -> None:
    said("capacity", "us-central2-b", "v4-16", "0")
    said("quota", "us-central2", "v4", "8", "--spot")
    said("zone", "us-east5-b", "down")
    found = json.loads(said("status", "--json"))
    assert found["capacity"] == [{"zone": "us-central2-b", "what": "v4-16", "amount": 0}]
    assert found["quota"] == [{"place": "us-central2", "generation": "v4", "tier": "spot", "amount": 8}]
    assert found["unreachable"] == ["us-east5-b"]
    shown = said("status")
    assert "capacity of us-central2-b: 0 of v4-16" in shown
    assert "zone us-east5-b is unreachable" in shown
    with pytest.raises(exceptions.ResourceExhausted, match="no more capacity"):
        create(client)
    for words in (("capacity", "us-central2-b", "v4-16"), ("quota", "us-central2", "v4", "--spot")):
        said(*words, "unlimited")
    said("zone", "us-east5-b", "up")
    found = json.loads(said("status", "--json"))
    assert (found["capacity"], found["quota"], found["unreachable"]) == ([], [], [])
    create(client)
    said("state", "n", "HIDDEN")
    assert client.get_node(name=f"{PARENT}/nodes/n").state == tpu_v2.Node.State.HIDDEN


def test_faults_are_listed_and_removed_one_by_one(endpoints: dict[str, str]) -> None:
    first, second = said("fault", "add", "stockout", "--count", "2").strip(), said("fault", "rate").strip()
    assert f"fault {first}: Create* operation-error service tpu 2 times" in said("fault", "list")
    said("fault", "clear", first)
    assert list(json.loads(said("fault", "list", "--json"))) == [second]
    said("fault", "clear")
    assert json.loads(said("fault", "list", "--json")) == {}
    assert json.loads(said("clock", "--json"))["now"] > 1e9


def test_wrong_name_is_told_with_what_was_meant(endpoints: dict[str, str]) -> None:
    for words, expected in (
        (("fault", "stockuot"), "there is no preset 'stockuot'; did you mean 'stockout'?"),
        (("fault", "clear", "7"), "there is no fault 7; set: none"),
        (("preempt", "n"), "there is no node 'n'; there is none"),
        (("host", "kil", "n", "0"), "there is no host action 'kil'; did you mean 'kill'?"),
        (("capacity", "us-central2-b", "v4-17", "0"), "did you mean 'v4-"),
        (("capacity", "us-central2", "v4", "0"), "'us-central2' is no zone"),
        (("quota", "us-central2", "v7", "0"), "there is no generation 'v7'; known: v2, v3"),
        (("quota", "us-central2", "v4", "many"), "'many' is no amount: give a whole number, or unlimited"),
        (("zone", "us-central2-b", "dwon"), "there is no state of a zone 'dwon'; did you mean 'down'?"),
        (("start", "--profile", "instnat"), "did you mean 'instant'?"),
    ):
        with pytest.raises(ConfigError) as caught:
            CliRunner().invoke(app, ["emulator", *words], catch_exceptions=False)
        assert (expected in str(caught.value), "\n" in str(caught.value)) == (True, False), str(caught.value)


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
        (("start", "--profile", "none"), "; known: instant, realistic", 2),
        (("preemt", "n"), "No such command 'preemt'. Did you mean 'preempt'?", 2),
        (("stop",), "no emulated cloud runs", 0),
    ):
        done = tpu(*words)
        assert (done.returncode, expected in " ".join((done.stdout + done.stderr).split())) == (code, True), done
