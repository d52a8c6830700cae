"""What befalls the hosts of a run: the run comes to the end it would have come to, and nothing is left over."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.conftest import STEPS, Account, Cluster, Outcome, check_end
from tests.integration.conftest import eventually

pytestmark = pytest.mark.timeout(900)
HOLD = "import sys, time; held = open(sys.argv[1]); print('held', flush=True); time.sleep(600)"


def test_one_run_survives_its_agents_a_raylet_a_poisoned_host_and_two_preemptions(
    cluster: Cluster, undisturbed: Outcome, account: Account
) -> None:
    run = cluster.start("battered", until=3, every=1000)
    (first_slice,) = cluster.slices()

    cluster.kill_agents()
    run.reaches(6, attempt=0)
    logs = [cluster.home.state / "logs" / f"host-{first_slice}-{worker}.log" for worker in range(2)]
    eventually(lambda: all("taking over Ray" in log.read_text() for log in logs), "new agents")

    lock = Path(cluster.host_process(1, "cluster.vm.host_agent").environ()["TMPDIR"]) / "libtpu_lockfile"
    lock.touch()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(cluster.disk(1) / "dev" / "accel0")], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with account.recovery("raylet of worker 1 killed, host poisoned", run, attempt=1):
        cluster.kill_raylet(1)
    run.reaches(3, attempt=1)
    assert cluster.slices() == [first_slice], "worker 1 joined again"
    assert holder.wait(20) == -signal.SIGTERM
    holder.stdout.close()
    assert not lock.exists()

    with account.recovery("preempted, with 30 s notice", run, attempt=2):
        cluster.preempt(notice=30)
    run.reaches(STEPS // 2, attempt=2)
    (checkpoint, *_) = run.events("checkpoint")
    assert min(run.losses(2)) == checkpoint["step"] + 1 == max(run.losses(1)) + 1, "taken on notice: none was due, and no step was lost"
    with account.recovery("preempted, without notice", run, attempt=3):
        second_slice = cluster.preempt(notice=0)
    assert second_slice != first_slice

    run.end()
    check_end(run, undisturbed, preempted=2, infrastructure=1)
    assert {event["kind"] for event in run.events("notice")} == {"preempted"}
    assert second_slice not in cluster.slices()


@pytest.mark.long
def test_a_maintenance_event_moves_the_run_to_a_new_slice(cluster: Cluster, undisturbed: Outcome, account: Account) -> None:
    run = cluster.start("maintained", until=13, every=1000)
    (before,) = cluster.slices()
    with account.recovery("maintenance, with 30 s notice", run, attempt=1):
        cluster.admin("POST", "/maintain", node=before, notice=30)
    run.end()
    check_end(run, undisturbed, preempted=1)
    assert {event["kind"] for event in run.events("notice")} == {"maintenance"}
    assert before not in cluster.slices()


@pytest.mark.long
def test_the_death_of_worker_0s_raylet_costs_the_slice(cluster: Cluster, undisturbed: Outcome, account: Account) -> None:
    run = cluster.start("raylet-0", until=13)
    (before,) = cluster.slices()
    with account.recovery("raylet of worker 0 killed", run, attempt=1):
        cluster.kill_raylet(0)
    run.end()
    check_end(run, undisturbed, infrastructure=1)
    assert before not in cluster.slices()


@pytest.mark.long
def test_a_sick_machine_is_replaced_with_its_slice(cluster: Cluster, undisturbed: Outcome, account: Account) -> None:
    run = cluster.start("sick", "run.spares=false", until=13)
    (before,) = cluster.slices()
    with (run.directory.path / "logs" / "0" / "host-1.log").open("a") as log:
        log.write("RuntimeError: Failed to initialize TPU system\n")
    with account.recovery("a process that blames its machine", run, attempt=1):
        cluster.children(run, 0)[1].kill()
    run.end()
    check_end(run, undisturbed, infrastructure=1)
    assert before not in cluster.slices()


def test_slices_whose_head_is_gone_for_good_delete_themselves(cluster: Cluster, undisturbed: Outcome) -> None:
    """The last one: it costs the cluster."""
    assert cluster.slices()
    cluster.kill_head()
    eventually(lambda: cluster.slices() == [], "no slice bills for nobody", limit=120)
