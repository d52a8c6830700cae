"""What befalls the hosts of a run: the run comes to the end it would have come to, and nothing is left over."""

import signal

import pytest

from launcher.runs import RunState
from tests.chaos.conftest import STEPS, Cluster, Run
from tests.integration.conftest import eventually

pytestmark = pytest.mark.timeout(300)


def check_end(run: Run, undisturbed: dict[int, float], *, preempted: int = 0, infrastructure: int = 0) -> None:
    """It SUCCEEDED, without a gap, and every step of every attempt came out as in a run to which nothing happened."""
    status = run.directory.status()
    assert status is not None
    assert status.state is RunState.SUCCEEDED
    assert (status.recoveries.preempted, status.recoveries.infrastructure) == (preempted, infrastructure), status.first_failure
    attempts = [run.losses(attempt) for attempt in range(status.attempt + 1)]
    assert sorted({step for losses in attempts for step in losses}) == list(range(1, STEPS + 1))
    for losses in attempts:
        assert losses == {step: undisturbed[step] for step in losses}


def test_a_preemption_with_notice_checkpoints_first_and_goes_on_on_a_new_slice(cluster: Cluster, undisturbed: dict[int, float]) -> None:
    (before,) = cluster.slices()
    run = cluster.start("preempted", until=13, every=1000)
    cluster.admin("POST", "/preempt", node=before, notice=30)
    output = run.end()
    check_end(run, undisturbed, preempted=1)
    (checkpoint, *_) = run.events("checkpoint")
    assert checkpoint["step"] >= 13, "taken on notice: no other was due"
    (first,) = [event for event in run.events("first_step") if event["attempt"] == 1]
    assert first["step"] == checkpoint["step"] + 1, "no step was lost"
    assert {event["kind"] for event in run.events("notice")} == {"preempted"}
    assert cluster.slices() != [before]
    assert "preempted" in output


def test_a_preemption_without_notice_is_charged_to_the_cloud(cluster: Cluster, undisturbed: dict[int, float]) -> None:
    run = cluster.start("taken", until=13)
    (before,) = cluster.slices()
    cluster.admin("POST", "/preempt", node=before, notice=0)
    run.end()
    check_end(run, undisturbed, preempted=1)
    assert before not in cluster.slices()


@pytest.mark.long
def test_a_maintenance_event_moves_the_run_to_a_new_slice(cluster: Cluster, undisturbed: dict[int, float]) -> None:
    run = cluster.start("maintained", until=13, every=1000)
    (before,) = cluster.slices()
    cluster.admin("POST", "/maintain", node=before, notice=30)
    run.end()
    check_end(run, undisturbed, preempted=1)
    assert {event["kind"] for event in run.events("notice")} == {"maintenance"}
    assert before not in cluster.slices()


@pytest.mark.parametrize("worker", [pytest.param(0, marks=pytest.mark.long), 1])
def test_the_death_of_a_raylet_costs_its_host_or_with_worker_0_its_slice(
    cluster: Cluster, undisturbed: dict[int, float], worker: int
) -> None:
    run = cluster.start(f"raylet-{worker}", until=13)
    (before,) = cluster.slices()
    (raylet,) = [process for process in cluster.host_processes(worker, "raylet/raylet") if "raylet" in process.name()]
    raylet.send_signal(signal.SIGKILL)
    run.end()
    check_end(run, undisturbed, infrastructure=1)
    assert (cluster.slices() == [before]) is (worker == 1)


def test_a_killed_host_agent_comes_back_and_the_run_does_not_notice(cluster: Cluster, undisturbed: dict[int, float]) -> None:
    run = cluster.start("agentless", until=5)
    agents = cluster.host_processes(0, "cluster.vm.host_agent") + cluster.host_processes(1, "cluster.vm.host_agent")
    assert len(agents) == 2
    for agent in agents:
        agent.send_signal(signal.SIGKILL)
    run.end()
    check_end(run, undisturbed)
    eventually(lambda: len(cluster.host_processes(0, "cluster.vm.host_agent")) == 1, "a new agent")
    (log,) = (cluster.home.state / "logs").glob(f"host-{cluster.slices()[0]}-0.log")
    assert "taking over Ray" in log.read_text()


def test_what_holds_an_accelerator_before_ray_starts_is_ended(cluster: Cluster) -> None:
    """On the disk that a host reboots with."""


def test_slices_whose_head_is_gone_for_good_delete_themselves(cluster: Cluster, undisturbed: dict[int, float]) -> None:
    """The last test of this file: it costs the cluster."""
    assert cluster.slices()
    for process in cluster.home.processes():
        if process.environ().get("PODLAUNCH_OWNER", "").startswith("head-"):
            process.send_signal(signal.SIGKILL)
    eventually(lambda: cluster.slices() == [], "no slice bills for nobody", limit=120)
