"""Placement and the supervisor's account: decisions without Ray."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig
from launcher.config import LaunchConfig
from launcher.data.config import DataConfig
from launcher.gang.placement import Host, incomplete, living_hosts, process_environment
from launcher.gang.record import RunRecord
from launcher.models.config import ModelConfig
from launcher.runs import RunDirectory, RunState, RunStatus


def node(slice_name: str | None, worker: int | None, *, alive: bool = True) -> dict[str, Any]:
    labels = {} if slice_name is None else {"ray.io/tpu-slice-name": slice_name, "ray.io/tpu-worker-id": str(worker)}
    return {"NodeID": f"{slice_name}-{worker}", "NodeManagerAddress": f"10.0.0.{worker}", "Alive": alive, "Labels": labels}


def hosts(*names: tuple[str, int]) -> list[Host]:
    return [Host(slice_name, worker, f"10.0.{slice_name[-1]}.{worker}", f"{slice_name}-{worker}") for slice_name, worker in names]


def test_hosts_are_ordered_by_slice_and_worker_whatever_ray_says_first() -> None:
    nodes = [node("s1", 10), node(None, None), node("s1", 2), node("s0", 0), node("other", 0), node("s0", 1, alive=False)]
    assert [host.name for host in living_hosts(nodes, ["s0", "s1"])] == ["s0/0", "s1/2", "s1/10"]


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ([("s0", 0), ("s0", 1)], []),
        ([("s0", 0)], ["s0"]),
        ([], ["s0"]),
        ([("s0", 0), ("s0", 0)], ["s0"]),  # a host that registered twice is not two hosts
        ([("s0", 0), ("s0", 2)], ["s0"]),
    ],
)
def test_a_slice_is_complete_with_each_worker_once(present: list[tuple[str, int]], expected: list[str]) -> None:
    assert incomplete(hosts(*present), ["s0"], hosts_per_slice=2) == expected


def test_one_slice_gets_no_megascale_variables() -> None:
    env = process_environment(hosts(("s0", 0), ("s0", 1)), 1, 1234, 5678)
    assert {name: value for name, value in env.items() if name.startswith("PODLAUNCH_")} == {
        "PODLAUNCH_COORDINATOR": "10.0.0.0:1234",
        "PODLAUNCH_NUM_PROCESSES": "2",
        "PODLAUNCH_PROCESS_ID": "1",
    }
    assert {name: value for name, value in env.items() if not name.startswith("PODLAUNCH_")} == {
        "JAX_COORDINATOR_ADDRESS": "10.0.0.0:1234",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "1",
    }


def test_each_process_of_two_slices_knows_its_slice() -> None:
    gang = hosts(("s0", 0), ("s0", 1), ("s1", 0), ("s1", 1))
    envs = [process_environment(gang, index, 1234, 5678) for index in range(4)]
    assert [env["MEGASCALE_SLICE_ID"] for env in envs] == ["0", "0", "1", "1"]
    assert {env["MEGASCALE_COORDINATOR_ADDRESS"] for env in envs} == {"10.0.0.0:5678"}
    assert {env["MEGASCALE_NUM_SLICES"] for env in envs} == {"2"}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "a-run")
    config = LaunchConfig(
        ClusterConfig(name="c", accelerator_type="v4-16", cloud="emulated"), ModelConfig("gemma3-nano"), DataConfig("python_stdlib")
    )
    directory.create(config)
    directory.write_status(RunStatus("a-run", "c", RunState.QUEUED, started_at=1000.0))
    return directory


def record_of(run: RunDirectory, clock: Clock, usd_per_hour: float | None = 3600.0) -> RunRecord:
    status = run.status()
    assert status is not None
    return RunRecord(run, status, clock, usd_per_hour)


def test_every_second_between_start_and_end_belongs_to_a_phase(run: RunDirectory) -> None:
    clock = Clock()
    record = record_of(run, clock)
    for state, phase, seconds in (
        (RunState.STARTING, "waiting for capacity", 5.0),
        (RunState.STARTING, "starting processes", 3.0),
        (RunState.RECOVERING, "recovering", 2.0),
    ):
        record.enter(state, phase)
        clock.now += seconds
    record.apply({"event": "phase", "phase": "training"})
    clock.now += 30.0
    record.apply({"event": "step", "step": 7, "total_steps": 10, "loss": 2.5, "tokens_per_second": 10.0, "mfu": None})
    record.apply({"event": "phase", "phase": "exporting"})
    clock.now += 20.0
    record.enter(RunState.SUCCEEDED, "", ended_at=clock.now)
    clock.now += 99.0  # after the end nothing counts
    record.write()
    status = run.status()
    assert status is not None
    assert status.phases == {"waiting for capacity": 5.0, "starting processes": 3.0, "recovering": 2.0, "training": 30.0, "exporting": 20.0}
    assert (status.step, status.total_steps, status.loss, status.goodput) == (7, 10, 2.5, 0.5)


def test_slices_cost_from_when_the_run_holds_them_until_it_gives_them_back(run: RunDirectory) -> None:
    clock = Clock()
    record = record_of(run, clock, usd_per_hour=3600.0)
    record.enter(RunState.STARTING, "waiting for capacity")
    clock.now += 100
    record.hold_slices(["s0"], 2)
    clock.now += 7
    record.hold_slices([], 2)
    clock.now += 100
    record.write()
    status = run.status()
    assert status is not None
    assert status.cost_usd == 7.0


def told(record: RunRecord, clock: Clock, *events: tuple[float, dict[str, Any]]) -> None:
    """Each event after so many seconds."""
    for seconds, event in events:
        clock.now += seconds
        record.apply({"time": clock.now, **event})


def phase(name: str) -> dict[str, Any]:
    return {"event": "phase", "phase": name}


def step(number: int, stall_s: float = 0.0) -> dict[str, Any]:
    return {"event": "step", "step": number, "total_steps": 10, "stall_s": stall_s}


def test_steps_done_again_are_lost_work_and_stalls_and_saves_are_no_training(run: RunDirectory) -> None:
    clock = Clock()
    record = record_of(run, clock)
    record.hold_slices(["s0"], 2)
    record.begin_attempt()
    told(record, clock, (0, phase("training")), (4, step(1)), (4, step(2, stall_s=1.0)), (0, phase("saving")), (3, phase("training")))
    told(record, clock, (4, step(3, stall_s=1.5)), (4, step(4, stall_s=1.5)))
    record.enter(RunState.STARTING, "starting processes")
    record.begin_attempt()
    told(record, clock, (5, phase("restoring")), (2, {"event": "restored", "step": 2}), (0, phase("training")))
    told(record, clock, (4, step(3)), (4, step(4)), (4, step(5)), (0, phase("saving")))
    record.write()
    status = record.status
    assert status.phases == {
        "training": 18.5,
        "training again": 8.0,
        "starting processes": 5.0,
        "saving": 3.0,
        "restoring": 2.0,
        "input stall": 1.5,
    }
    assert status.costs == status.phases, "a dollar a second"
    assert (status.step, status.highest_step) == (5, 5)
    assert status.goodput == pytest.approx(18.5 / 38)


def test_the_gang_stalls_for_its_slowest_host(run: RunDirectory) -> None:
    clock = Clock()
    record = record_of(run, clock)
    record.begin_attempt()
    told(record, clock, (0, phase("training")))
    clock.now += 10
    record.apply(step(1, stall_s=7.0), 1)
    record.apply(step(1, stall_s=0.5), 0)
    record.write()
    assert record.status.phases == {"input stall": 7.0, "training": 3.0}


@pytest.mark.parametrize(
    ("state", "counts_as"),
    [
        (RunState.QUEUED, "starting processes"),
        (RunState.RUNNING, "recovering"),
        (RunState.STOPPED, "idle"),
        (RunState.SUSPENDED, "idle"),
    ],
)
def test_the_next_supervisor_goes_on_with_the_account_and_knows_what_the_time_between_was(
    run: RunDirectory, state: RunState, counts_as: str
) -> None:
    left = RunStatus("a-run", "c", state, started_at=1000.0, updated_at=1100.0, phases={"training": 100.0}, highest_step=7)
    (run.path / "status.json").unlink()
    run.write_status(left)
    clock = Clock()
    clock.now = 1150.0
    record = RunRecord(run, left, clock, None)
    record.begin_attempt()
    told(record, clock, (0, phase("training")), (30, step(7)), (20, step(8)))
    record.write()
    assert record.status.phases == {"training": 120.0, counts_as: 50.0, "training again": 30.0}
    assert sum(record.status.phases.values()) == record.status.updated_at - record.status.started_at


def test_a_slice_is_paid_for_from_when_it_boots(run: RunDirectory) -> None:
    clock = Clock()
    record = record_of(run, clock)
    for waits_for in ("waiting for capacity", "booting hosts", "waiting for capacity"):
        record.enter(RunState.STARTING, waits_for)
        clock.now += 10
    record.write()
    assert record.status.costs == {"booting hosts": 10.0}


def test_a_clock_of_a_host_that_is_ahead_takes_no_time_from_later_phases(run: RunDirectory) -> None:
    clock = Clock()
    record = record_of(run, clock)
    record.apply({**phase("compiling"), "time": clock.now + 50})
    clock.now += 10
    record.apply({**phase("training"), "time": clock.now})
    record.write()
    assert record.status.phases == {"compiling": 10.0}


def test_a_transition_that_no_run_makes_is_refused(run: RunDirectory) -> None:
    record = record_of(run, Clock())
    with pytest.raises(ValueError, match="QUEUED -> RUNNING is no transition"):
        record.enter(RunState.RUNNING, "training")


def test_a_status_of_a_later_version_is_still_read(run: RunDirectory) -> None:
    path = run.path / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_later": 1}))
    status = run.status()
    assert status is not None
    assert status.state is RunState.QUEUED


def test_of_a_script_that_tells_no_step_nobody_knows_the_goodput(run: RunDirectory) -> None:
    clock = Clock()
    record = record_of(run, clock)
    record.enter(RunState.STARTING, "starting processes")
    record.apply({"event": "phase", "phase": "script"})
    clock.now += 10.0
    record.write()
    assert record.status.phase == "running the script"
    assert record.status.goodput is None
    record.apply({"event": "phase", "phase": "training"})
    record.apply({"event": "step", "step": 7, "total_steps": 0, "loss": None, "tokens_per_second": None, "mfu": None})
    clock.now += 10.0
    record.write()
    status = run.status()
    assert status is not None
    assert status.goodput == 0.5
