"""Ray's own autoscaler v2 over our node provider and the emulated cloud, in virtual time: every trap that it is known to have."""

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler.v2.instance_manager.config import FileConfigReader

from cluster.autoscaler import autoscaler_config, host_settings, node_type
from cluster.config import ClusterConfig, SliceType
from cluster.emulator.cloud import READY
from cluster.emulator.faults import BOOT_HOST, TPU_PRESETS, Effect, Fault
from cluster.secret_place import SecretPlace
from cluster.state import clusters_dir
from cluster.tpu.refusals import read_refusals
from cluster.vm.bundle import Bundle
from cluster.vm.metadata import HOST_ATTRIBUTE
from tests.inprocess import Failure
from tests.simulated_ray import Gcs, Run, Simulation, simulation

A, B = "us-central2-b", "us-east5-a"
CONFIG = ClusterConfig(
    name="mine", project="my-project", zones=[A, B], accelerator_type="v4-16", slices=2, max_slices=4, idle_minutes=5, provisioning="spot"
)
KIND = node_type(CONFIG)
HOUR = 3600.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path))
    (clusters_dir() / "mine").mkdir()
    return tmp_path


@pytest.fixture
def sim(folder: Path) -> Iterator[Simulation]:
    with simulation(CONFIG, folder) as made:
        yield made


def want(sim: Simulation, slices: int = 1, seconds: float = 10 * HOUR) -> Run:
    run = Run(slices, seconds, KIND)
    sim.gcs.runs.append(run)
    return run


def running(sim: Simulation, *runs: Run, within: float = 900.0) -> None:
    assert sim.run(within, lambda: all(sim.gcs.complete(run) for run in runs)), (sim.standing(), sim.instances())


def node(sim: Simulation, name: str) -> Any:
    (found,) = [node for node in sim.world.cloud._nodes.values() if node.node_id == name]
    return found


def held_by(sim: Simulation, run: Run) -> list[str]:
    return sorted(item.slice_name for item in sim.gcs.held(run))


def test_all_slices_of_a_run_are_asked_for_together_and_go_when_nobody_wants_them(sim: Simulation) -> None:
    run = want(sim, slices=3, seconds=600.0)
    sim.tick()
    sim.tick()
    assert len(sim.standing()) == 3
    running(sim, run)
    assert sim.run(HOUR, lambda: run in sim.gcs.finished)
    ended = sim.world.clock.now()
    assert sim.run(HOUR, lambda: not sim.everything())
    assert 300.0 <= sim.world.clock.now() - ended <= 300.0 + 60.0
    assert (sim.instances(), sim.records()) == ({}, 4)  # the head's is the fourth


def test_min_slices_are_made_without_demand_and_stay(folder: Path) -> None:
    with simulation(dataclasses.replace(CONFIG, min_slices=1), folder) as sim:
        run = want(sim, slices=2, seconds=60.0)
        assert sim.run(HOUR, lambda: run in sim.gcs.finished)
        sim.run(HOUR)
        assert len(sim.everything()) == 1


def test_a_slice_missing_from_a_listing_is_made_again_once(sim: Simulation) -> None:
    run = want(sim)
    running(sim, run)
    (name,) = held_by(sim, run)
    sim.world.cloud.delete_node(node(sim, name).path)  # by somebody at a console
    sim.run(60.0)
    running(sim, run)
    assert held_by(sim, run) != [name]
    assert len(sim.standing()) == 1


def test_a_listing_whose_second_page_fails_costs_ticks_and_no_slice(sim: Simulation) -> None:
    run = want(sim, slices=3)
    running(sim, run)
    before = held_by(sim, run)

    def fail(method: str, request: Any) -> None:
        if method in ("ListNodes", "ListQueuedResources"):
            request.page_size = 2
            if request.page_token:
                raise Failure(14, "The service is currently unavailable.")

    sim.channel.before = fail
    sim.run(300.0)
    assert sim.skipped > 0
    sim.channel.before = lambda method, request: None
    sim.run(300.0)
    assert (held_by(sim, run), len(sim.standing())) == (before, 3)


def test_a_zone_that_does_not_answer_keeps_its_slices(sim: Simulation) -> None:
    run = want(sim, slices=2)
    running(sim, run)
    before = held_by(sim, run)
    sim.world.cloud.set_reachable(A, False)
    sim.run(HOUR)
    sim.world.cloud.set_reachable(A, True)
    sim.run(300.0)
    assert (held_by(sim, run), len(sim.standing())) == (before, 2)


def test_hours_of_refusals_leave_ray_a_short_memory(folder: Path) -> None:
    """Ray keeps every failed launch for ever and goes through all of them at each tick, so a refusal must not become one."""
    config = dataclasses.replace(CONFIG, queued_resource=False)  # a plain node is refused at once
    with simulation(config, folder, tick_s=20.0) as sim:
        sim.world.cloud.faults.add(TPU_PRESETS["quota"])
        run = want(sim, slices=2)
        sim.run(3 * HOUR)
        assert (sim.everything(), sim.records()) == ([], 3)
        assert any(line.startswith("quota used up in us-central2") for line in read_refusals("mine")[1])
        sim.world.cloud.faults.clear()
        running(sim, run, within=2 * HOUR)


def test_a_missing_permission_is_told_and_what_waited_for_it_is_made(sim: Simulation) -> None:
    sim.world.cloud.faults.add(TPU_PRESETS["permission"])
    with pytest.raises(AssertionError):
        running(sim, want(sim))
    sim.world.cloud.faults.clear()
    sim.world.cloud.faults.add(dataclasses.replace(TPU_PRESETS["permission"], method="Create*"))
    sim.run(HOUR)
    assert any("permission denied" in line for line in read_refusals("mine")[1])
    assert sim.channel.calls["CreateQueuedResource"] < 20, "somebody has to do something first"
    sim.world.cloud.faults.clear()
    running(sim, *sim.gcs.runs)
    assert sim.records() == 2


def test_a_creation_waits_for_no_cloud(sim: Simulation) -> None:
    """Ray has few threads for creations; one that waited would hold up all the others (ray#37971)."""
    want(sim)
    sim.gcs.follow()
    sim.autoscaler.update_autoscaling_state()
    sim.autoscaler.main.run()
    before = dict(sim.channel.calls)
    sim.autoscaler.launches.run()
    assert dict(sim.channel.calls) == before
    sim.settle()
    assert sim.channel.calls["CreateQueuedResource"] == 1


@pytest.mark.parametrize("effect", [Effect.DROP_ANSWER, Effect.DROP])
def test_a_creation_whose_answer_is_lost_is_made_once(sim: Simulation, effect: Effect) -> None:
    rules = sim.world.cloud.faults
    number = rules.add(Fault(effect, "CreateQueuedResource"))
    get = rules.add(Fault(Effect.ERROR, "GetQueuedResource"))
    run = want(sim, slices=2)
    sim.run(120.0)
    rules.remove(number)
    rules.remove(get)
    running(sim, run)
    assert len(sim.everything()) == 2
    sim.run(HOUR)
    assert len(sim.everything()) == 2


def test_a_slice_that_waits_for_hours_keeps_its_place(folder: Path) -> None:
    """Ray gives up an instance after 10 minutes (REQUESTED) or an hour (ALLOCATED) unless told otherwise."""
    with simulation(dataclasses.replace(CONFIG, zones=[A], valid_until="6h"), folder, tick_s=20.0) as sim:
        sim.world.cloud.set_capacity(A, "*", 0)
        run = want(sim)
        sim.run(60.0)
        ((zone, name),) = sim.standing()
        created = {record.message.create_time.seconds for record in sim.world.cloud.queued._all.values()}
        sim.run(4 * HOUR)
        assert sim.standing() == [(zone, name)]
        assert {record.message.create_time.seconds for record in sim.world.cloud.queued._all.values()} == created
        sim.world.cloud.set_capacity(A, "*", None)
        running(sim, run)
        assert held_by(sim, run) == [name]


def test_a_request_that_outlives_its_run_is_withdrawn_and_never_filled(sim: Simulation) -> None:
    for zone in (A, B):
        sim.world.cloud.set_capacity(zone, "*", 0)
    run = want(sim, slices=2)
    sim.run(120.0)
    assert len(sim.standing()) == 2
    sim.gcs.end(run)
    assert sim.run(1200.0, lambda: not sim.everything())
    for zone in (A, B):
        sim.world.cloud.set_capacity(zone, "*", None)
    sim.run(600.0)
    assert (sim.everything(), sim.instances()) == ([], {})


def test_a_run_that_asks_again_at_once_finds_its_place_in_the_queue(sim: Simulation) -> None:
    for zone in (A, B):
        sim.world.cloud.set_capacity(zone, "*", 0)
    run = want(sim)
    sim.run(120.0)
    before = sim.standing()
    sim.gcs.end(run)
    sim.run(120.0)
    want(sim)
    sim.run(HOUR / 10)
    assert sim.standing() == before


@pytest.mark.parametrize("worker", [0, 1])
@pytest.mark.parametrize("notice", [True, False])
def test_a_slice_with_a_dead_host_is_replaced(sim: Simulation, worker: int, notice: bool) -> None:
    """Of worker 0's death Ray learns by itself, of another's it takes no notice; the API says READY all the while."""
    run = want(sim, slices=2)
    running(sim, run)
    sick, sound = held_by(sim, run)
    item = node(sim, sick)
    sim.gcs.sick.add((item.uid, worker))
    if notice:  # the host agent drains what it is told will go
        for known in sim.gcs.nodes.values():
            known.status = 2 if (known.slice_uid, known.worker) == (item.uid, worker) else known.status
    assert sim.run(400.0, lambda: sick not in {name for _, name in sim.standing()})
    assert item.message.state != READY
    running(sim, run)
    assert sound in held_by(sim, run)
    assert len(sim.standing()) == 2


def test_a_host_that_comes_back_in_time_costs_no_slice(sim: Simulation) -> None:
    run = want(sim)
    running(sim, run)
    before = held_by(sim, run)
    key = (node(sim, before[0]).uid, 1)
    sim.gcs.sick.add(key)
    sim.run(100.0)
    sim.gcs.sick.discard(key)
    sim.gcs.nodes.pop(key)  # it registers anew
    sim.run(600.0)
    assert held_by(sim, run) == before


def test_a_slice_whose_hosts_never_boot_is_replaced_after_its_grace(sim: Simulation) -> None:
    rule = sim.world.cloud.faults.add(Fault(Effect.HANG, BOOT_HOST, resource="*/hosts/1", count=1))
    run = want(sim)
    assert sim.run(300.0, lambda: sim.world.nodes() != {} and "READY" in sim.world.nodes().values())
    ready = sim.world.clock.now()
    ((_, name),) = sim.standing()
    assert sim.run(HOUR, lambda: name not in {standing for _, standing in sim.standing()})
    assert 600.0 <= sim.world.clock.now() - ready <= 660.0
    sim.world.cloud.faults.remove(rule)
    running(sim, run)


def test_ray_that_does_not_answer_condemns_no_slice(sim: Simulation) -> None:
    run = want(sim)
    running(sim, run)
    before = held_by(sim, run)
    answer = sim.gcs.get_cluster_resource_state

    def silent() -> bytes:
        raise RuntimeError("Failed to connect to GCS")

    sim.gcs.get_cluster_resource_state = silent  # type: ignore[method-assign]  # Ray's head hangs
    sim.run(HOUR / 2)
    sim.gcs.get_cluster_resource_state = answer  # type: ignore[method-assign]
    sim.run(300.0)
    assert held_by(sim, run) == before


def test_a_preempted_slice_is_deleted_although_deletions_fail_for_long(sim: Simulation) -> None:
    """A preempted node put Ray's own provider into an exception loop (ray#29698), or stayed and ate quota (marin#87)."""
    sim.world.cloud.set_quota("us-central2", "v4", 16, spot=True)  # for one slice
    sim.world.cloud.set_quota("us-east5", "v4", 0, spot=True)
    run = want(sim)
    running(sim, run)
    (name,) = held_by(sim, run)
    rule = sim.world.cloud.faults.add(Fault(Effect.ERROR, "Delete*"))
    sim.world.cloud.preempt(name, notice=0.0)
    sim.run(600.0)
    sim.world.cloud.faults.remove(rule)
    running(sim, run, within=2 * HOUR)
    assert name not in {known for _, known in sim.everything()}


def test_a_head_that_lost_its_memory_keeps_the_slices_and_their_types(sim: Simulation) -> None:
    run = want(sim, slices=2)
    running(sim, run)
    before = held_by(sim, run)
    sim.start_head()
    sim.run(600.0)
    assert (held_by(sim, run), len(sim.standing()), len(sim.instances())) == (before, 2, 2)
    sim.gcs.end(run)
    assert sim.run(HOUR, lambda: not sim.everything())


def test_a_second_cluster_in_the_project_is_left_alone(sim: Simulation, folder: Path) -> None:
    """A second cluster took the first one's workers (ray#20286)."""
    config = dataclasses.replace(CONFIG, name="mine-too")
    (clusters_dir() / "mine-too").mkdir()
    other = Simulation(sim.world, config, Gcs(sim.world, config, random.Random(1)), folder, tick_s=0.0)
    run, more = want(sim), want(other, slices=2)
    sim.gcs.clusters, other.gcs.clusters = {"mine"}, {"mine-too"}
    for _ in range(100):
        other.tick()
        sim.tick()
    assert sim.gcs.complete(run)
    assert other.gcs.complete(more)
    sim.gcs.end(run)
    for _ in range(150):
        other.tick()
        sim.tick()
    assert other.gcs.complete(more)
    assert len(other.everything()) == 2
    assert [name for _, name in sim.everything() if not name.startswith("mine-too-")] == []


def test_never_more_than_max_even_while_deletions_fail(sim: Simulation) -> None:
    run = want(sim, slices=4)
    running(sim, run)
    sim.world.cloud.faults.add(Fault(Effect.ERROR, "Delete*"))
    for name in held_by(sim, run)[:2]:
        sim.gcs.sick |= {(node(sim, name).uid, worker) for worker in (0, 1)}
    for _ in range(200):
        sim.tick()
        assert len(sim.standing()) <= 4
    sim.world.cloud.faults.clear()
    running(sim, run)
    assert len(sim.standing()) == 4


def test_a_zone_that_keeps_killing_slices_is_left_for_another_one(sim: Simulation) -> None:
    run = want(sim)
    zones = []
    for _ in range(4):
        running(sim, run, within=HOUR)
        (name,) = held_by(sim, run)
        zones.append(node(sim, name).zone)
        if zones[-1] == B:
            break
        sim.world.cloud.preempt(name, notice=0.0)
        sim.run(30.0)
    assert zones == [A, A, A, B]
    (line,) = [line for line in read_refusals("mine")[1] if "die young" in line]
    assert "slices die young (3 of 3 slices lived less than 15 min in the last 30 min) in us-central2-b, next try in" in line


def test_slices_that_lived_long_are_no_churn(sim: Simulation) -> None:
    run = want(sim)
    for _ in range(4):
        running(sim, run, within=HOUR)
        sim.run(1200.0)
        (name,) = held_by(sim, run)
        assert node(sim, name).zone == A
        sim.world.cloud.preempt(name, notice=0.0)
        sim.run(30.0)


@pytest.mark.parametrize("key", ["setup_commands", "head_setup_commands", "worker_setup_commands"])
def test_rays_own_reader_takes_our_file_and_dies_without_a_legacy_key(tmp_path: Path, key: str) -> None:
    written = autoscaler_config(CONFIG, host_settings(CONFIG, "h:1", SecretPlace(file="/t")), Bundle("b"), "0123456789ab")
    file = tmp_path / "autoscaler.yaml"
    file.write_text(yaml.safe_dump(written))
    read = FileConfigReader(str(file)).get_cached_autoscaling_config()
    assert read.get_node_type_configs()[KIND].max_worker_nodes == 4
    file.write_text(yaml.safe_dump({name: value for name, value in written.items() if name != key}))
    with pytest.raises(KeyError, match=key):
        FileConfigReader(str(file)).get_cached_autoscaling_config()


TWO = dataclasses.replace(
    CONFIG, node_types={"eval": SliceType(accelerator_type="v5litepod-8", provisioning="on-demand", zones=["us-west4-a"], max_slices=2)}
)


def test_two_types_of_slices_are_told_apart_and_listed_at_once(folder: Path) -> None:
    with simulation(TWO, folder) as sim:
        run, more = want(sim, slices=2), Run(1, 10 * HOUR, "v5litepod-8")
        sim.gcs.runs.append(more)
        running(sim, run, more)
        kinds = {node(sim, name).message.accelerator_type for name in held_by(sim, run)}
        (other,) = held_by(sim, more)
        assert (kinds, node(sim, other).message.accelerator_type) == ({"v4-16"}, "v5litepod-8")
        assert (node(sim, other).zone, node(sim, other).message.scheduling_config.spot) == ("us-west4-a", False)
        settings = json.loads(node(sim, other).message.metadata[HOST_ATTRIBUTE])
        assert (settings["node_type"], settings["slice_resource"], settings["chips_per_host"]) == (
            "v5litepod-8", "podlaunch-slice-v5litepod-8", 8,
        )  # fmt: skip
        before = sim.channel.calls["ListNodes"]
        sim.tick()
        assert sim.channel.calls["ListNodes"] == before + 1
        sim.world.cloud.preempt(other, notice=0.0)
        sim.run(120.0)
        running(sim, run, more)
        assert len(sim.standing()) == 3
        for done in (run, more):
            sim.gcs.end(done)
        assert sim.run(HOUR, lambda: not sim.everything())


def test_each_type_has_its_own_least_and_most(folder: Path) -> None:
    types = {"eval": dataclasses.replace(TWO.node_types["eval"], min_slices=1, max_slices=2)}
    with simulation(dataclasses.replace(TWO, node_types=types), folder) as sim:
        for _ in range(4):
            sim.gcs.runs.append(Run(1, 10 * HOUR, "v5litepod-8"))
        sim.run(600.0)
        assert [zone for zone, _ in sim.standing()] == ["us-west4-a"] * 2
        for run in list(sim.gcs.runs):
            sim.gcs.end(run)
        sim.run(HOUR)
        assert len(sim.everything()) == 1
