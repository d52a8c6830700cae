"""A cluster whose head is a VM, on the emulated cloud: started, used, lost, started again, ended; and clusters that end themselves."""

import json
import shutil
import socket
import sqlite3
from pathlib import Path

import pytest

from cluster.compute import Instances
from cluster.heads import DASHBOARD_PORT
from cluster.secrets import SecretStore
from tests.integration.conftest import SECRET, Home, eventually
from tests.stub_gcloud import forwarding_gcloud

pytestmark = pytest.mark.timeout(420)
TINY = ("trainer=debug", "trainer.steps=2", "trainer.eval_batches=1", "data.max_bytes=200000", "run.name=on-a-vm")
HEAD = "podlaunch-local-head"


class Cloud:
    """The emulated services of a home, through the real clients."""

    def __init__(self, home: Home) -> None:
        where = json.loads(home.tpu("emulator", "status", "--json").stdout)
        self.instances = Instances(where["rest"], "podlaunch-emulated")
        self.secrets = SecretStore(where["grpc"], "podlaunch-emulated")

    def close(self) -> None:
        self.instances.close()
        self.secrets.close()

    def left(self) -> list[str]:
        return [one.name for one in self.instances.list({})] + self.secrets.list({})


def rows(home: Home) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(home.tpu("status", "--json").stdout)
    return found


def read_store(home: Home, folder: Path) -> dict[str, bytes]:
    """Every table of the emulated cloud as text, except what Secret Manager keeps."""
    copy = folder / "copy.sqlite3"
    with sqlite3.connect(home.state / "emulator" / "cloud.sqlite3") as source, sqlite3.connect(copy) as target:
        source.backup(target)
    connection = sqlite3.connect(copy)
    names = [name for (name,) in connection.execute("select name from sqlite_master where type='table'")]
    tables = {name: repr(connection.execute(f"select * from {name}").fetchall()).encode() for name in names if "secret" not in name}
    for opened in (connection, source, target):
        opened.close()
    return tables


def command_lines(home: Home) -> list[bytes]:
    found = []
    for process in home.processes():
        try:
            found.append(Path(f"/proc/{process.pid}/cmdline").read_bytes())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.long
def test_a_run_on_a_head_vm_that_is_lost_and_made_again(alone: Home, tmp_path: Path) -> None:
    started = alone.tpu("start", "head=vm", "-y")
    assert started.returncode == 0, started.stderr
    cloud = Cloud(alone)
    assert cloud.left() == [HEAD, "podlaunch-local-token"]
    token = (alone.state / "clusters" / "local" / "token").read_text()

    run = alone.launch("cluster=local", "cluster.head=vm", *TINY)
    assert run.returncode == 0, run.stdout + run.stderr
    assert alone.status("on-a-vm").state == "SUCCEEDED"
    assert cloud.left() == [HEAD, "podlaunch-local-token"], "the run's secrets went with the run"
    for value in (token.encode(), SECRET.encode()):
        tables = read_store(alone, tmp_path)
        assert len(tables) >= 3
        assert all(value not in content for content in tables.values())
        logs = [path for path in (alone.state / "logs").iterdir() if path.is_file()]
        assert any("supervisor" in path.name for path in logs)
        assert all(value not in path.read_bytes() for path in [*logs, *(alone.state / "emulator" / "hosts").glob("*/serial.log")])
        lines = command_lines(alone)
        assert any(b"gcs_server" in line for line in lines)
        assert all(value not in line for line in lines)

    cloud.instances.delete("us-central2-b", HEAD)
    eventually(lambda: HEAD not in cloud.left(), "the head VM is gone", limit=60)
    assert rows(alone)[0]["head"] == "DOWN"
    again = alone.tpu("start", "head=vm", "-y")
    assert again.returncode == 0, again.stderr
    assert "is gone: cleaning up" in again.stderr
    assert rows(alone)[0]["head"] == "UP"
    assert (alone.state / "clusters" / "local" / "token").read_text() != token

    cloud.close()
    stopped = alone.tpu("stop", "-y")
    assert stopped.returncode == 0, stopped.stderr
    assert alone.processes() == []
    assert not (alone.state / "emulator" / "hosts").exists()
    assert "no cluster is up" in alone.tpu("status").stdout


def test_a_cluster_of_this_machine_ends_itself_and_leaves_nothing(alone: Home) -> None:
    assert alone.tpu("start", "--slices", "1", "--detach", "--autostop", "12s").returncode == 0
    eventually(lambda: alone.processes() == [], "nothing of it runs any more", limit=120)
    (row,) = rows(alone)
    assert str(row["ended"]).startswith("stopped by autostop")
    assert not (alone.state / "emulator" / "hosts").exists(), "no node is left"
    assert "stopped by autostop" in alone.tpu("status").stdout
    assert not (alone.state / "clusters" / "local" / "token").exists()
    again = alone.tpu("start")
    assert again.returncode == 0, again.stderr
    assert rows(alone)[0]["head"] == "UP"


def test_a_head_vm_behind_a_tunnel_ends_its_cluster_and_itself(alone: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", DASHBOARD_PORT)) == 0:
            pytest.skip(f"somebody else's dashboard has this machine's port {DASHBOARD_PORT}, and an emulated VM has no other loopback")
    monkeypatch.setenv("PATH", forwarding_gcloud(tmp_path / "bin")["PATH"])
    assert shutil.which("gcloud") == str(tmp_path / "bin" / "gcloud")
    started = alone.tpu("start", "head=vm", "head_access=tunnel", "--autostop", "15s", "-y")
    assert started.returncode == 0, started.stderr
    shown = alone.tpu("dashboard")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("http://127.0.0.1:")
    call = (tmp_path / "bin" / "calls").read_text().splitlines()
    assert len(call) == 1, "one tunnel serves all commands"
    assert f"{HEAD} --zone us-central2-b --project podlaunch-emulated --tunnel-through-iap" in call[0]

    cloud = Cloud(alone)
    eventually(lambda: cloud.left() == [], "neither VM nor secret", limit=120)
    cloud.close()
    (row,) = rows(alone)
    assert str(row["ended"]).startswith("stopped by autostop")
    stopped = alone.tpu("stop", "-y")
    assert stopped.returncode == 0, stopped.stderr
    assert alone.processes() == []
    assert [path.name for path in (alone.state / "clusters").iterdir()] == [".local.lock"]
