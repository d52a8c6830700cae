"""Queued resources of the emulated cloud, with time in the test's hands."""

import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest
from google.cloud import tpu_v2
from google.rpc import error_details_pb2

from cluster.emulator.clock import ManualClock
from cluster.emulator.cloud import READY, Cloud
from cluster.emulator.hosts import NoHosts
from cluster.emulator.model import Refusal
from cluster.emulator.profile import INSTANT, Profile
from cluster.emulator.queued_states import TRANSITIONS, Event, State
from cluster.emulator.store import Store

ZONE = "us-central2-b"
PARENT = f"projects/p/locations/{ZONE}"
PATH = f"{PARENT}/queuedResources/q"
SLOW = Profile(create=60.0, delete=30.0, accept=2.0, queue=10.0, suspend=20.0)


class World:
    def __init__(self, database: Path | None = None, profile: Profile = INSTANT) -> None:
        self.store, self.clock = Store(database), ManualClock()
        self.cloud = Cloud(self.store, NoHosts(), self.clock, state_dir=Path("/state"), profile=profile)
        self.cloud.resume()
        weakref.finalize(self, self.store.close)

    def create(self, queued_id: str = "q", *, request_id: str = "", **more: Any) -> Any:
        return self.cloud.queued.create(PARENT, queued_id, body(**more), request_id)

    def state(self, path: str = PATH) -> str:
        return State(self.cloud.queued.get(path).state.state).name

    def nodes(self) -> list[str]:
        return [node.name.rpartition("/")[2] for node in map(tpu_v2.Node.pb().FromString, self.cloud.list_nodes(PARENT)[0])]


def body(**more: Any) -> Any:
    node = {"accelerator_type": "v4-16", "runtime_version": "tpu-ubuntu2204-base"}
    spec = more.pop("spec", {"node_id": "n"})
    return tpu_v2.QueuedResource.pb()(tpu={"node_spec": [{"parent": PARENT, "node": node, **spec}]}, **more)


def test_creation_ends_when_accepted_and_the_node_is_ready_when_active() -> None:
    world = World(profile=SLOW)
    operation = world.create(spot={})
    seen = [world.state()]
    for seconds in (2.0, 10.0, 60.0):
        world.clock.advance(seconds)
        seen.append(world.state())
        if seconds == 2.0:
            done = world.cloud.get_operation(operation.name)
            accepted = tpu_v2.QueuedResource.pb()()
            assert done.done
            assert done.response.Unpack(accepted)
            assert accepted.state.state == State.ACCEPTED
    assert seen == ["CREATING", "ACCEPTED", "PROVISIONING", "ACTIVE"]
    node = world.cloud.get_node(f"{PARENT}/nodes/n")
    assert (node.state, node.queued_resource, node.scheduling_config.spot) == (READY, PATH, True)


def test_multislice_makes_numbered_nodes() -> None:
    world = World()
    world.create(spec={"multislice_params": {"node_count": 3}})
    world.clock.advance()
    assert (world.state(), world.nodes()) == ("ACTIVE", ["q-0", "q-1", "q-2"])
    assert world.cloud.get_node(f"{PARENT}/nodes/q-0").multislice_node


def test_request_waits_for_capacity_and_the_oldest_gets_it_first() -> None:
    world = World()
    world.cloud.set_capacity(ZONE, "v4-16", 1)
    world.cloud.create_node(PARENT, "other", body().tpu.node_spec[0].node)
    for name in ("b", "a"):
        world.create(name, spec={"node_id": f"n-{name}"})
        world.clock.advance()
    paths = [f"{PARENT}/queuedResources/{name}" for name in ("b", "a")]
    assert [world.state(path) for path in paths] == ["WAITING_FOR_RESOURCES"] * 2
    world.cloud.delete_node(f"{PARENT}/nodes/other")
    world.clock.advance()
    assert [world.state(path) for path in paths] == ["ACTIVE", "WAITING_FOR_RESOURCES"]
    world.cloud.set_capacity(ZONE, "v4-16", None)
    world.clock.advance()
    assert world.state(paths[1]) == "ACTIVE"


@pytest.mark.parametrize(
    "policy", [{"valid_until_duration": {"seconds": 100}}, {"valid_until_time": {"seconds": 1_000_100}}], ids=["duration", "time"]
)
def test_request_without_capacity_fails_when_its_time_is_over(policy: dict[str, Any]) -> None:
    world = World()
    world.cloud.set_capacity(ZONE, "v4", 4)
    world.create(queueing_policy=policy)
    world.clock.advance(99.0)
    assert world.state() == "WAITING_FOR_RESOURCES"
    world.clock.advance(1.0)
    assert world.state() == "FAILED"
    assert world.cloud.queued.get(PATH).state.failed_data.error.code == 4
    world.cloud.queued.delete(PATH)
    world.clock.advance()
    assert world.cloud.queued.list_page(PARENT) == ([], "")


def test_request_valid_later_waits_until_then() -> None:
    world = World()
    world.create(queueing_policy={"valid_after_duration": {"seconds": 50}})
    world.clock.advance(49.0)
    assert world.state() == "WAITING_FOR_RESOURCES"
    world.clock.advance(1.0)
    assert world.state() == "ACTIVE"


def test_delete_needs_force_while_there_are_nodes_and_takes_them_along() -> None:
    world = World()
    world.create()
    world.clock.advance()
    with pytest.raises(Refusal, match="use force") as caught:
        world.cloud.queued.delete(PATH)
    assert caught.value.code == 9
    operation = world.cloud.queued.delete(PATH, force=True)
    assert world.state() == "DELETING"
    world.clock.advance()
    assert world.cloud.get_operation(operation.name).done
    assert world.nodes() == []
    with pytest.raises(Refusal, match="was not found"):
        world.state()


def test_losing_a_node_suspends_and_reset_waits_for_capacity_again() -> None:
    world = World()
    world.create()
    world.clock.advance()
    world.cloud.delete_node(f"{PARENT}/nodes/n")
    world.clock.advance()
    assert (world.state(), world.nodes()) == ("SUSPENDED", [])
    world.cloud.queued.reset(PATH)
    world.clock.advance()
    assert (world.state(), world.nodes()) == ("ACTIVE", ["n"])
    with pytest.raises(Refusal, match="cannot be reset while it is ACTIVE"):
        world.cloud.queued.reset(PATH)


def test_the_same_request_id_means_the_same_operation() -> None:
    world = World()
    first = world.create(request_id="r1")
    world.clock.advance()
    assert world.create(request_id="r1").name == first.name
    with pytest.raises(Refusal, match="already exists"):
        world.create(request_id="r2")
    deletion = world.cloud.queued.delete(PATH, force=True, request_id="r3")
    world.clock.advance()
    again = world.cloud.queued.delete(PATH, force=True, request_id="r3")
    assert (again.name, again.done) == (deletion.name, True)


def test_cancelled_creation_leaves_nothing() -> None:
    world = World(profile=SLOW)
    operation = world.create()
    world.cloud.cancel_operation(operation.name)
    world.clock.advance(100.0)
    assert world.cloud.get_operation(operation.name).error.code == 1
    assert world.cloud.queued.list_page(PARENT) == ([], "")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"spec": {"node_id": "N"}}, "nodeId"),
        ({"spec": {"multislice_params": {"node_count": 1}}}, "greater than 1"),
        ({"spec": {"node_id": "n", "parent": "projects/p/locations/us-east5-a"}}, "nodeSpec.parent"),
        ({"spec": {"node_id": "n", "node": {"accelerator_type": "v4-17"}}}, "was not found in zone"),
        ({"spec": {"node_id": "taken"}}, "already exists"),
    ],
)
def test_create_refuses_what_the_service_would_refuse(more: dict[str, Any], words: str) -> None:
    world = World()
    world.cloud.create_node(PARENT, "taken", body().tpu.node_spec[0].node)
    with pytest.raises(Refusal, match=words):
        world.create(**more)


def test_quota_counts_what_failed_and_was_suspended_too() -> None:
    world = World()
    world.cloud.set_quota("us-central2", "v4", 16, spot=True)
    world.create(spot={})
    world.clock.advance()
    world.cloud.delete_node(f"{PARENT}/nodes/n")
    world.clock.advance()
    assert world.state() == "SUSPENDED"
    with pytest.raises(Refusal, match="Quota limit 'TPUV4sPreemptiblePodPerProjectPerRegionForTPUAPI' has been exceeded") as caught:
        world.create("q2", spot={}, spec={"node_id": "n2"})
    assert isinstance(caught.value.details[0], error_details_pb2.QuotaFailure)
    world.create("on-demand", spec={"node_id": "n3"})


@pytest.mark.parametrize("steps", range(6))
def test_next_daemon_goes_on_from_wherever_the_last_one_ended(tmp_path: Path, steps: int) -> None:
    first = World(tmp_path / "cloud.sqlite3", SLOW)
    first.create()
    for seconds in itertools.islice((2.0, 10.0, 30.0, 30.0, 1.0), steps):
        first.clock.advance(seconds)
    before = first.state()
    first.store.close()  # what a SIGKILL leaves: nothing is written at the end
    second = World(tmp_path / "cloud.sqlite3", SLOW)
    assert second.state() == before
    second.clock.advance(200.0)
    assert (second.state(), second.nodes()) == ("ACTIVE", ["n"])
    operation = second.cloud.queued.delete(PATH, force=True)
    second.store.close()
    third = World(tmp_path / "cloud.sqlite3", SLOW)
    third.clock.advance(200.0)
    assert third.cloud.get_operation(operation.name).done
    assert third.nodes() == []
    third.store.close()


def test_table_leads_from_every_state_to_deletion_and_knows_every_event() -> None:
    def leaving(state: State) -> set[State | None]:
        return {after for (before, _), after in TRANSITIONS.items() if before is state}

    assert all(State.DELETING in leaving(state) for state in State if state is not State.DELETING)
    assert leaving(State.DELETING) == {None}
    assert {event for _, event in TRANSITIONS} == set(Event)
