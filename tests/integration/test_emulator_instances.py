"""Instances and secrets of the emulated cloud as a daemon, with real processes, through the clients that podlaunch itself uses."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.cloud_errors import NotFoundError
from cluster.compute import Instance, Instances
from cluster.local import LocalEndpoints, ask_emulator, emulator_status, ensure_emulator, stop_emulator
from cluster.secrets import SecretStore
from cluster.state import emulator_dir, logs_dir

ZONE = "us-central1-a"
PAYLOAD = "a payload that nobody may see"
# Writes what the VM finds around it, then stays.
SCRIPT = """
root="http://$GCE_METADATA_HOST/computeMetadata/v1"
ask() { curl -sf -H 'Metadata-Flavor: Google' "$root/$1"; echo; }
for key in instance/name instance/zone instance/network-interfaces/0/ip instance/attributes/colour project/project-id; do
  ask "$key"
done > "$HOME/answers"
curl -s -o /dev/null -w '%{http_code}' "$root/instance/name" > "$HOME/unflavoured"
"$PODLAUNCH_HOME/bin/python" - > "$HOME/token" <<'END'
from google.auth import compute_engine
from google.auth.transport.requests import Request
credentials = compute_engine.Credentials()
credentials.refresh(Request())
print(credentials.token, credentials.service_account_email)
END
env > "$HOME/environment"
cat "$PODLAUNCH_HOME/bundle.sha256" > "$HOME/bundle"
(setsid sleep 1234.5 &)
touch "$HOME/done"
exec sleep 1234.5
"""


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path / "state"))
    yield tmp_path / "state"
    stop_emulator()
    assert not processes(tmp_path)


@pytest.fixture
def endpoints(state: Path) -> LocalEndpoints:  # the state directory must be the test's own first
    return ensure_emulator("cafe")


@pytest.fixture
def instances(endpoints: LocalEndpoints) -> Iterator[Instances]:
    made = Instances(endpoints.rest, "my-project")
    yield made
    made.close()


@pytest.fixture
def secrets(endpoints: LocalEndpoints) -> Iterator[SecretStore]:
    made = SecretStore(endpoints.grpc, "my-project")
    yield made
    made.close()


def processes(folder: Path) -> list[psutil.Process]:
    """Those of VMs whose disks lie under `folder`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and str(folder) in process.environ().get("HOME", ""):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def disk() -> Path:
    (found,) = (emulator_dir() / "hosts").iterdir()
    return found


def boot(instances: Instances, name: str = "head") -> Instance:
    items = [{"key": "startup-script", "value": SCRIPT}, {"key": "colour", "value": "green"}]
    spec = {
        "name": name,
        "machineType": f"zones/{ZONE}/machineTypes/e2-standard-4",
        "disks": [{"boot": True}],
        "networkInterfaces": [{}],
        "labels": {"cluster": "mine"},
        "metadata": {"items": items},
    }
    instances.wait_operation(ZONE, instances.insert(ZONE, spec), timeout=30)
    wait(lambda: (disk() / "home" / "done").exists())
    found = instances.get(ZONE, name)
    assert found is not None
    return found


def crash() -> int:
    """Kill the daemon and return its process id."""
    running = emulator_status()
    assert running is not None
    os.kill(running.pid, signal.SIGKILL)
    wait(lambda: emulator_status() is None)
    return running.pid


def test_startup_script_runs_and_knows_where_it_is_and_delete_leaves_no_process(instances: Instances, state: Path) -> None:
    found = boot(instances)
    assert found.status == "RUNNING"
    home = disk() / "home"
    name, zone, ip, colour, project = (home / "answers").read_text().split()
    assert (name, zone.split("/")[2:], ip, colour, project) == ("head", ["zones", ZONE], found.ip, "green", "my-project")
    assert (home / "unflavoured").read_text() == "403"
    assert (home / "token").read_text(), (disk() / "serial.log").read_text()
    token, account = (home / "token").read_text().split()
    assert (token.startswith("emulated-"), account.endswith("-compute@developer.gserviceaccount.com")) == (True, True)
    assert (home / "bundle").read_text() == "cafe"
    env = dict(line.split("=", 1) for line in (home / "environment").read_text().splitlines())
    assert (env["PODLAUNCH_STATE_DIR"], env["JAX_PLATFORMS"]) == (str(state), "cpu")
    assert env["GCE_METADATA_HOST"].startswith(f"{found.ip}:")
    assert len(processes(state)) == 2  # its own and the one that left its session
    assert instances.delete(ZONE, "head")
    wait(lambda: instances.get(ZONE, "head") is None)
    assert processes(state) == []
    assert list((emulator_dir() / "hosts").iterdir()) == []


def test_kill_of_the_daemon_keeps_instances_and_secrets(
    instances: Instances, secrets: SecretStore, endpoints: LocalEndpoints, state: Path
) -> None:
    before = boot(instances)
    secrets.create("token", PAYLOAD, {"cluster": "mine"})
    pids = {process.pid for process in processes(state)}
    crash()
    assert ensure_emulator("cafe") == endpoints
    assert instances.get(ZONE, "head") == before
    assert secrets.read("token") == PAYLOAD
    assert {process.pid for process in processes(state)} == pids
    environment = next(process.environ() for process in processes(state))
    url = f"http://{environment['GCE_METADATA_HOST']}/computeMetadata/v1/instance/name"
    asked = subprocess.run(["curl", "-sf", "-H", "Metadata-Flavor: Google", url], capture_output=True, check=True, timeout=10, text=True)
    assert asked.stdout == "head"
    instances.delete(ZONE, "head")
    wait(lambda: processes(state) == [])


def test_instance_hangs_wakes_dies_boots_again_and_is_lost(instances: Instances, state: Path) -> None:
    boot(instances)

    def statuses() -> set[str]:
        return {process.status() for process in processes(state)}

    def act(action: str) -> None:
        ask_emulator("POST", "/instance", {"instance": "head", "action": action})

    act("hang")
    wait(lambda: statuses() == {psutil.STATUS_STOPPED})
    act("wake")
    wait(lambda: psutil.STATUS_STOPPED not in statuses())
    act("kill")
    wait(lambda: processes(state) == [])
    wait(lambda: bool(ask_emulator("GET", "/instances")[0]["exited"]))
    found = instances.get(ZONE, "head")
    assert found is not None
    assert found.status == "RUNNING"
    act("boot")
    wait(lambda: len(processes(state)) == 2)
    act("lose")
    wait(lambda: instances.get(ZONE, "head") is None)
    assert processes(state) == []


def test_status_shows_instances_and_payloads_are_nowhere(instances: Instances, secrets: SecretStore, state: Path) -> None:
    boot(instances)
    secrets.create("token", PAYLOAD, {"cluster": "mine"})
    assert secrets.read("token") == PAYLOAD
    program = str(Path(sys.executable).parent / "tpu")
    shown = subprocess.run([program, "emulator", "status", "--json"], capture_output=True, text=True, timeout=60, check=True).stdout
    (one,) = json.loads(shown)["instances"]
    assert (one["name"].rpartition("/")[2], one["status"], one["exited"], one["labels"]) == ("head", "RUNNING", False, {"cluster": "mine"})
    table = subprocess.run([program, "emulator", "status"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "head" in table
    texts = [shown, table, *(path.read_text() for path in logs_dir().iterdir())]
    assert not [text for text in texts if PAYLOAD in text]
    secrets.delete("token")
    with pytest.raises(NotFoundError):
        secrets.read("token")


def test_stop_ends_instances_and_forgets_secrets_of_a_dead_daemon_too(instances: Instances, secrets: SecretStore, state: Path) -> None:
    boot(instances)
    secrets.create("token", PAYLOAD, {"cluster": "mine"})
    crash()
    assert processes(state)
    assert stop_emulator()
    assert processes(state) == []
    stored = b"".join(path.read_bytes() for path in emulator_dir().glob("cloud.sqlite3*"))
    assert PAYLOAD.encode() not in stored
    ensure_emulator("cafe")
    assert secrets.list({}) == []
    assert instances.list({}) == []
