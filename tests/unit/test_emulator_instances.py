"""The emulated Compute Engine's own rules, with time and hosts in the test's hands."""

import weakref
from pathlib import Path
from typing import Any

import pytest

from cluster.emulator.clock import ManualClock
from cluster.emulator.cloud import Cloud
from cluster.emulator.faults import Effect, Fault
from cluster.emulator.filters import parse
from cluster.emulator.hosts import NoHosts
from cluster.emulator.instance_states import TRANSITIONS, Event, State
from cluster.emulator.metadata import entries, lookup
from cluster.emulator.model import HostRecord, Machine, Refusal
from cluster.emulator.profile import Profile
from cluster.emulator.store import Store

ZONE = "us-central1-a"
PATH = f"projects/p/zones/{ZONE}/instances/n"
SECONDS = Profile(provision=3.0, stage=7.0, delete=30.0)


class RecordedHosts(NoHosts):
    """Remembers whose processes run."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.disks: set[str] = set()
        self.ended = False
        self.signals: list[int] = []

    def start(self, machine: Machine) -> None:
        if not machine.hosts[0].held:
            self.running.add(machine.uid)
            self.disks.add(machine.uid)

    def halt(self, machine: Machine) -> None:
        self.running.discard(machine.uid)

    def stop(self, machine: Machine) -> None:
        self.halt(machine)
        self.disks.discard(machine.uid)

    def signal(self, machine: Machine, host: HostRecord, number: int) -> None:
        self.signals.append(number)

    def exited(self, host: HostRecord) -> bool:
        return self.ended


class World:
    def __init__(self, database: Path | None = None) -> None:
        self.clock, self.hosts, self.store = ManualClock(), RecordedHosts(), Store(database)
        self.cloud = Cloud(self.store, self.hosts, self.clock, state_dir=Path("/state"), profile=SECONDS)
        self.cloud.resume()
        self.instances = self.cloud.instances
        weakref.finalize(self, self.store.close)

    def insert(self, name: str = "n", **more: Any) -> str:
        """The path of the operation."""
        body = {
            "name": name,
            "machineType": f"zones/{ZONE}/machineTypes/e2-standard-4",
            "disks": [{"boot": True}],
            "networkInterfaces": [{}],
            **more,
        }
        return operation(self.instances.insert("p", ZONE, body))

    def status(self) -> str:
        return str(self.instances.get(PATH)["status"])

    def done(self, path: str) -> bool:
        return bool(self.instances.get_operation(path)["status"] == "DONE")


def operation(body: dict[str, Any]) -> str:
    return f"projects/p/zones/{ZONE}/operations/{body['name']}"


def test_every_state_can_be_deleted_and_every_event_is_in_the_table() -> None:
    assert all(TRANSITIONS[state, Event.DELETE] is State.STOPPING for state in State)
    assert {event for _, event in TRANSITIONS} == set(Event)


def test_insert_goes_through_its_states_as_the_profile_says() -> None:
    world = World()
    began = world.insert()
    seen = []
    for seconds in (0.0, 3.0, 7.0):
        world.clock.advance(seconds)
        seen.append((world.status(), world.done(began), len(world.hosts.running)))
    assert seen == [("PROVISIONING", False, 0), ("STAGING", False, 0), ("RUNNING", True, 1)]
    ended = operation(world.instances.delete(PATH))
    assert (world.status(), world.done(ended), len(world.hosts.running)) == ("STOPPING", False, 1)
    world.clock.advance(30.0)
    assert (world.done(ended), world.hosts.running, world.hosts.disks, world.store.instances()) == (True, set(), set(), [])


@pytest.mark.parametrize("after", [0.0, 3.0])
def test_delete_while_it_comes_up_is_not_revived(after: float) -> None:
    world = World()
    began = world.insert()
    world.clock.advance(after)
    world.instances.delete(PATH)
    assert world.instances.get_operation(began)["error"]["errors"][0]["code"] == "RESOURCE_OPERATION_ABORTED"
    world.clock.advance(60.0)
    assert (world.instances.describe(), world.hosts.running) == ([], set())


def test_second_delete_gives_the_deletion_under_way() -> None:
    world = World()
    world.insert()
    world.clock.advance(10.0)
    assert world.instances.delete(PATH)["name"] == world.instances.delete(PATH)["name"]


@pytest.mark.parametrize(("keep", "left"), [(False, []), (True, ["TERMINATED"])])
def test_lost_instance_has_no_processes_and_is_gone_or_terminated(keep: bool, left: list[str]) -> None:
    world = World()
    world.insert()
    with pytest.raises(Refusal, match="is PROVISIONING"):
        world.instances.lose("n")
    world.clock.advance(10.0)
    world.instances.lose("n", keep=keep)
    assert world.status() == "STOPPING"
    world.clock.advance(0.0)
    assert ([one["status"] for one in world.instances.describe()], world.hosts.running) == (left, set())
    if keep:
        world.instances.delete(PATH)
        world.clock.advance(30.0)
        assert world.instances.describe() == []


def test_ended_startup_script_is_written_down_and_the_instance_runs_on() -> None:
    world = World()
    world.insert()
    world.clock.advance(10.0)
    world.hosts.ended = True
    world.cloud.watch_hosts()
    assert [one.hosts[0].exited for one in world.store.instances()] == [True]
    assert world.status() == "RUNNING"


def test_faults_let_it_boot_late_fail_or_hang() -> None:
    world = World()
    world.cloud.faults.add(Fault(Effect.LATENCY, "BootHost", resource=f"{PATH}/hosts/0", seconds=100.0))
    world.insert()
    world.clock.advance(10.0)
    assert (world.status(), world.hosts.running, world.instances.describe()[0]["held"]) == ("RUNNING", set(), True)
    world.clock.advance(100.0)
    assert (len(world.hosts.running), world.instances.describe()[0]["held"]) == (1, False)
    world.cloud.faults.add(Fault(Effect.HANG, "instances.delete", count=1))
    world.instances.delete(PATH)
    world.clock.advance(1000.0)
    assert (world.status(), len(world.hosts.running)) == ("STOPPING", 1)
    world.cloud.faults.add(Fault.from_dict({"preset": "compute-stockout"}))
    failed = world.insert("second")
    world.clock.advance(10.0)
    error = world.instances.get_operation(failed)["error"]["errors"][0]
    assert (error["code"], len(world.instances.describe())) == ("ZONE_RESOURCE_POOL_EXHAUSTED", 1)


def test_next_daemon_goes_on_with_what_was_under_way(tmp_path: Path) -> None:
    first = World(tmp_path / "cloud.sqlite3")
    first.insert("running")
    first.insert("gone")
    first.clock.advance(10.0)
    first.insert("staging")
    first.clock.advance(3.0)
    ended = operation(first.instances.delete(PATH.replace("/n", "/gone")))
    began = first.insert("provisioning")
    ips = {one["name"]: one["ip"] for one in first.instances.describe()}
    first.store.close()  # what a SIGKILL leaves: nothing is written at the end

    second = World(tmp_path / "cloud.sqlite3")
    second.clock.advance(60.0)
    assert second.done(ended)
    assert second.done(began)
    assert {one["name"].rpartition("/")[2]: one["status"] for one in second.instances.describe()} == dict.fromkeys(
        ("running", "staging", "provisioning"), "RUNNING"
    )
    assert len(second.hosts.running) == 3
    assert all(ips[one["name"]] == one["ip"] for one in second.instances.describe())
    second.insert("later")
    assert second.store.instances()[-1].host.ip not in ips.values()


def test_metadata_is_that_of_a_vm() -> None:
    world = World()
    script = {"items": [{"key": "startup-script", "value": "true"}, {"key": "colour", "value": "green"}]}
    world.insert(metadata=script, networkInterfaces=[{"accessConfigs": [{}]}])
    instance = world.store.instances()[0]
    values = entries(instance, 0)
    root = "/computeMetadata/v1/"
    assert (values["instance/name"], values["instance/attributes/colour"]) == ("n", "green")
    assert values["instance/zone"].endswith(f"/zones/{ZONE}")
    assert values["instance/network-interfaces/0/ip"] == instance.host.ip
    assert values["instance/network-interfaces/0/access-configs/0/external-ip"] == instance.host.ip
    assert not {"instance/attributes/agent-worker-number", "instance/attributes/tpu-env"} & values.keys()
    assert '"access_token": "emulated-' in values["instance/service-accounts/default/token"]
    found = lookup(values, f"{root}instance/service-accounts/default/", recursive=True)
    assert found is not None
    assert '"scopes": ["https://www.googleapis.com/auth/cloud-platform"]' in found[0]
    assert "access_token" not in found[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("labels.a=x", True),
        ('labels.a = "x" AND status=RUNNING', True),
        ("(labels.a=x) (labels.b:*)", False),
        ("labels.b!=x", True),
        ("name eq n.*", True),
        ("name ne n", False),
        ("labels.a=y", False),
    ],
)
def test_filter_tells_what_is_meant(text: str, expected: bool) -> None:
    assert parse(text)({"name": "n", "status": "RUNNING", "labels": {"a": "x"}}) is expected


@pytest.mark.parametrize("text", ["labels.a>x", "labels.a:x", "OR", "labels.a=x OR labels.b=y", "-labels.a=x"])
def test_filter_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(Refusal, match="Invalid list filter expression"):
        parse(text)


@pytest.mark.parametrize(("method", "state"), [("instances.insert", "PROVISIONING"), ("instances.delete", "STOPPING")])
def test_operation_that_hangs_goes_on_hanging_although_the_daemon_is_another(tmp_path: Path, method: str, state: str) -> None:
    first = World(tmp_path / "cloud.sqlite3")
    first.cloud.faults.add(Fault(Effect.HANG, method))
    began = first.insert()
    first.clock.advance(20.0)
    if method == "instances.delete":
        began = operation(first.instances.delete(PATH))
    first.cloud.faults.clear()
    first.store.close()
    second = World(tmp_path / "cloud.sqlite3")
    second.clock.advance(1000.0)
    assert (second.status(), second.done(began)) == (state, False)


def test_instance_that_is_held_boots_when_it_is_due_although_the_daemon_is_another(tmp_path: Path) -> None:
    first = World(tmp_path / "cloud.sqlite3")
    first.cloud.faults.add(Fault(Effect.LATENCY, "BootHost", seconds=100.0))
    first.insert()
    first.clock.advance(10.0)
    first.store.close()
    second = World(tmp_path / "cloud.sqlite3")  # its clock begins where the first one's did: 10 s before that one was held
    second.clock.advance(109.0)
    assert (second.status(), second.hosts.running) == ("RUNNING", set())
    second.clock.advance(1.0)
    assert len(second.hosts.running) == 1
