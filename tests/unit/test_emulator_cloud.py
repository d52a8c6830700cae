"""The emulated cloud's own rules, with time and hosts in the test's hands."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.cloud import tpu_v2

from cluster.emulator.clock import ManualClock
from cluster.emulator.cloud import CREATING, DELETING, READY, Cloud
from cluster.emulator.hosts import NoHosts, address
from cluster.emulator.model import HostRecord, Machine, Refusal, bounds
from cluster.emulator.store import Store
from cluster.tpu.catalog import all_types, lookup

PARENT = "projects/p/locations/us-central2-b"


class RecordedHosts(NoHosts):
    """Remembers what was asked of it; `during_start` is called in the middle of a start."""

    def __init__(self) -> None:
        self.alive: set[str] = set()
        self.ended: set[int] = set()
        self.during_start: Callable[[], None] = lambda: None

    def start(self, machine: Machine) -> None:
        self.alive.add(machine.uid)
        self.during_start()

    def halt(self, machine: Machine) -> None:
        self.alive.discard(machine.uid)

    def stop(self, machine: Machine) -> None:
        self.alive.discard(machine.uid)

    def run(self, machine: Machine, host: HostRecord, command: str) -> tuple[int, str]:
        return 0, command

    def exited(self, host: HostRecord) -> bool:
        return host.worker in self.ended

    def close(self) -> None:
        self.alive.clear()


class World:
    def __init__(self, database: Path | None = None) -> None:
        self.clock, self.hosts, self.store = ManualClock(), RecordedHosts(), Store(database)
        self.cloud = Cloud(self.store, self.hosts, self.clock, state_dir=Path("/state"))
        self.cloud.resume()
        weakref.finalize(self, self.store.close)

    def create(self, node_id: str = "n", **more: Any) -> Any:
        return self.cloud.create_node(PARENT, node_id, body(**more))

    def state(self, node_id: str = "n") -> int:
        return int(self.cloud.get_node(f"{PARENT}/nodes/{node_id}").state)


def body(**more: Any) -> Any:
    values = {"accelerator_type": "v4-16", "runtime_version": "tpu-ubuntu2204-base", **more}
    return tpu_v2.Node.pb()(**{key: value for key, value in values.items() if value is not None})


def test_create_goes_through_creating_to_ready_with_addresses_in_worker_order() -> None:
    world = World()
    operation = world.create()
    assert (world.state(), operation.done) == (CREATING, False)
    world.clock.advance()
    node = world.cloud.get_node(f"{PARENT}/nodes/n")
    assert node.state == READY
    assert [endpoint.ip_address.rpartition(".")[2] for endpoint in node.network_endpoints] == ["1", "2"]
    done = world.cloud.get_operation(operation.name)
    result = tpu_v2.Node.pb()()
    assert done.done
    assert done.response.Unpack(result)
    assert result == node


def test_delete_while_creating_is_not_revived() -> None:
    world = World()
    creation = world.create()
    deletion = world.cloud.delete_node(f"{PARENT}/nodes/n")
    assert world.state() == DELETING
    world.clock.advance()
    assert world.hosts.alive == set()
    assert world.cloud.get_operation(creation.name).error.code == 10
    assert world.cloud.get_operation(deletion.name).done
    with pytest.raises(Refusal, match="was not found"):
        world.state()


def test_delete_while_hosts_start_ends_them() -> None:
    world = World()
    world.create()
    world.hosts.during_start = lambda: void(world.cloud.delete_node(f"{PARENT}/nodes/n"))
    world.clock.advance()
    assert world.hosts.alive == set()
    assert world.cloud.list_nodes(PARENT) == ([], "")


def test_cancelled_creation_leaves_no_node() -> None:
    world = World()
    operation = world.create()
    world.cloud.cancel_operation(operation.name)
    world.clock.advance()
    assert world.cloud.get_operation(operation.name).error.code == 1
    assert world.cloud.list_nodes(PARENT) == ([], "")


def test_second_delete_gives_the_deletion_under_way() -> None:
    world = World()
    world.create()
    world.clock.advance()
    first = world.cloud.delete_node(f"{PARENT}/nodes/n")
    assert world.cloud.delete_node(f"{PARENT}/nodes/n").name == first.name


def test_name_is_taken_until_the_deletion_is_done() -> None:
    world = World()
    world.create()
    world.clock.advance()
    world.cloud.delete_node(f"{PARENT}/nodes/n")
    with pytest.raises(Refusal, match="already exists"):
        world.create()
    world.clock.advance()
    world.create()


def test_hosts_that_cannot_start_end_in_an_internal_error_and_no_node() -> None:
    world = World()
    operation = world.create()

    def no_address() -> None:
        raise OSError(99, "Cannot assign requested address")

    world.hosts.during_start = no_address
    world.clock.advance()
    assert world.cloud.get_operation(operation.name).error.code == 13
    assert world.cloud.list_nodes(PARENT) == ([], "")
    assert world.hosts.alive == set()


def test_ended_startup_script_is_written_down_and_the_node_stays_ready() -> None:
    world = World()
    world.create()
    world.clock.advance()
    world.hosts.ended = {1}
    world.cloud.watch_hosts()
    assert [host.exited for host in world.store.nodes()[0].hosts] == [False, True]
    assert world.state() == READY


@pytest.mark.parametrize(
    ("node_id", "more", "words"),
    [
        ("N", {}, "nodeId"),
        ("n" * 64, {}, "nodeId"),
        ("n", {"accelerator_type": "v4-17"}, "the accelerator v4-17 was not found in zone us-central2-b"),
        ("n", {"accelerator_type": "v5e-16"}, "was not found in zone"),  # the API knows it as v5litepod-16
        ("n", {"runtime_version": "tpu-vm-none"}, 'The "runtimeVersion" value "tpu-vm-none" was not found'),
        ("n", {"accelerator_type": None, "accelerator_config": {"type_": 7, "topology": "3x3x3"}}, "was not found in zone"),
        ("n", {"metadata": {"big": "x" * 300_000}}, 'metadata value of "big" is too large'),
        ("n", {"metadata": dict.fromkeys("abc", "x" * 200000)}, "metadata is too large"),
        ("n", {"accelerator_config": {"type_": 7, "topology": "2x2x2"}}, "mutually exclusive"),
    ],
)
def test_create_refuses_what_the_service_would_refuse(node_id: str, more: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        World().create(node_id, **more)


def test_create_by_topology_gets_the_type_of_that_size() -> None:
    world = World()
    world.create(accelerator_type=None, accelerator_config={"type_": 7, "topology": "4x4x16"})
    node = world.cloud.get_node(f"{PARENT}/nodes/n")
    assert (node.accelerator_type, node.accelerator_config.topology) == ("v4-512", "4x4x16")


def test_list_pages_are_complete_and_in_order() -> None:
    world = World()
    names = [f"n{index:02}" for index in range(7)]
    for name in names:
        world.create(name)
    seen: list[str] = []
    token = ""
    while True:
        page, token = world.cloud.list_nodes(PARENT, 3, token)
        seen += [tpu_v2.Node.pb().FromString(message).name.rpartition("/")[2] for message in page]
        if not token:
            break
    assert seen == names
    assert len(world.cloud.list_nodes("projects/p/locations/-")[0]) == 7
    assert world.cloud.list_nodes("projects/p/locations/us-east5-a") == ([], "")


def test_next_daemon_finds_nodes_and_finishes_what_was_under_way(tmp_path: Path) -> None:
    first = World(tmp_path / "cloud.sqlite3")
    for name in ("ready", "creating", "deleting"):
        first.create(name)
        if name == "ready":
            first.clock.advance()
    operation = first.cloud.delete_node(f"{PARENT}/nodes/deleting")
    hosts = first.store.nodes()[0].hosts
    first.store.close()  # what a SIGKILL leaves: nothing is written at the end

    second = World(tmp_path / "cloud.sqlite3")
    assert [second.state(name) for name in ("ready", "creating", "deleting")] == [READY, CREATING, DELETING]
    second.clock.advance()
    assert [second.state(name) for name in ("ready", "creating")] == [READY, READY]
    assert second.cloud.get_operation(operation.name).done
    assert second.store.nodes()[0].hosts == hosts
    second.create("later")
    ips = [host.ip for node in second.store.nodes() for host in node.hosts]
    assert len(set(ips)) == len(ips)
    second.store.close()


def test_addresses_stay_on_loopback_and_differ() -> None:
    found = {address(Path("/a"), index, worker) for index in range(0, 600, 3) for worker in (0, 1, 253, 254)}
    assert len(found) == 200 * 4
    assert all(16 <= int(ip.split(".")[1]) <= 239 and 1 <= int(ip.split(".")[2]) <= 254 for ip in found)


def test_bounds_multiply_to_the_slice() -> None:
    assert bounds(lookup("v4-16")) == ("2,2,1", "1,1,2")
    assert bounds(lookup("v5litepod-8")) == ("2,4,1", "1,1,1")
    assert bounds(lookup("v6e-16")) == ("2,2,1", "2,2,1")
    for kind in all_types():
        hosts = 1
        for axis in bounds(kind)[1].split(","):
            hosts *= int(axis)
        assert hosts == kind.hosts


def void(_: object) -> None:
    return
