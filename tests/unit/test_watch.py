"""What a command that follows a run makes of a head that is away, or gone; the head is an HTTP server of the test's own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.clusters import Cluster
from cluster.processes import ProcessRecord
from launcher.runs import RunDirectory, RunState, RunStatus
from launcher.watch import LOOK_S, PATIENCE, HeadGone, SupervisorWatch
from tests.unit.fake_head import Head


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "r")
    directory.path.mkdir()
    return directory


@pytest.fixture
def looks(cluster: Cluster, run: RunDirectory) -> Callable[[], str | None]:
    """Each call is a look; the cluster is found as long as its record is there."""
    run.write_status(RunStatus("r", "c", RunState.STARTING, job="job-1"))
    (cluster.folder / "cluster.json").touch()
    now = [0.0]
    watch = SupervisorWatch("c", run, lambda: now[0], lambda _: cluster if (cluster.folder / "cluster.json").exists() else None)

    def look() -> str | None:
        now[0] += LOOK_S
        return watch()

    return look


def shut(head: Head) -> None:
    head.server.shutdown()
    head.server.server_close()


def kill_agent(cluster: Cluster) -> None:
    (cluster.folder / "process.json").write_text(json.dumps(vars(ProcessRecord(2**22 + 1, 0.0, "m"))))


def unchanged(run: RunDirectory) -> bool:
    status = run.status()
    return status is not None and status.state is RunState.STARTING


def test_a_run_whose_job_lives_is_nothing_to_talk_about(looks: Callable[[], str | None], head: Head) -> None:
    head.answers["/api/jobs/"] = [{"submission_id": "job-1", "status": "RUNNING"}]
    assert looks() is None


def test_a_run_whose_supervisor_is_gone_is_left_to_the_keeper(
    looks: Callable[[], str | None],
    head: Head,
    run: RunDirectory,
) -> None:
    for jobs in ([], [{"submission_id": "job-1", "status": "FAILED"}]):
        head.answers["/api/jobs/"] = jobs
        for _ in range(2 * PATIENCE):
            assert looks() == "the run's supervisor is gone; the keeper on the head starts it again"
    assert unchanged(run)


def test_a_head_that_is_away_is_waited_for(looks: Callable[[], str | None], head: Head, run: RunDirectory) -> None:
    shut(head)
    for _ in range(2 * PATIENCE):
        assert "does not answer; the run goes on when it is back" in (looks() or "")
    assert unchanged(run)


def test_a_head_that_is_dead_altogether_needs_a_person(
    looks: Callable[[], str | None],
    head: Head,
    cluster: Cluster,
    run: RunDirectory,
) -> None:
    kill_agent(cluster)
    head.answers["/api/jobs/"] = [{"submission_id": "job-1", "status": "RUNNING"}]
    assert [looks() for _ in range(2 * PATIENCE)] == [None] * 2 * PATIENCE, "Ray and the run live without an agent"
    shut(head)
    assert [looks() for _ in range(PATIENCE - 1)] == [None] * (PATIENCE - 1)
    with pytest.raises(HeadGone, match="`tpu start` brings it back, and the run goes on by itself"):
        looks()
    assert unchanged(run), "it goes on when the head is back"


def test_a_cluster_that_is_gone_gives_whoever_stops_it_time_to_end_the_run(
    looks: Callable[[], str | None],
    cluster: Cluster,
    run: RunDirectory,
) -> None:
    (cluster.folder / "cluster.json").unlink()
    assert [looks() for _ in range(PATIENCE - 1)] == [None] * (PATIENCE - 1)
    run.write_status(RunStatus("r", "c", RunState.STOPPED))
    assert looks() is None


def test_a_cluster_that_nobody_knows_is_told_of(looks: Callable[[], str | None], cluster: Cluster, tmp_path: Path) -> None:
    (cluster.folder / "cluster.json").unlink()
    for _ in range(PATIENCE - 1):
        looks()
    with pytest.raises(HeadGone, match=f"tpu train stop {tmp_path / 'r'}"):
        looks()
