"""The submission of a job to a head that is busy."""

from pathlib import Path

import pytest

from cluster.clusters import Cluster
from cluster.errors import ClusterError
from cluster.ray_http import HeadRefused
from launcher import jobs
from launcher.runs import RunDirectory
from tests.unit.fake_head import Head, cluster, head  # noqa: F401  # fixtures

NO_AGENT = "No available agent to submit job, please try again later."
JOBS = "/api/jobs/"


def post(to: Cluster, folder: Path) -> list[float]:
    """How long it waited each time."""
    waited: list[float] = []
    jobs.post(to.http, RunDirectory(folder / "r"), "r-1", None, "index", clock=lambda: sum(waited), sleep=waited.append)
    return waited


def test_a_head_that_has_no_agent_yet_is_asked_again(head: Head, cluster: Cluster, tmp_path: Path) -> None:  # noqa: F811
    head.answers |= {f"POST {JOBS}": {}, JOBS: []}
    head.refusals = [NO_AGENT, NO_AGENT]
    assert post(cluster, tmp_path) == [1.0, 1.0]
    assert [body["submission_id"] for body in head.posted] == ["r-1"] * 3


def test_a_job_that_was_taken_all_the_same_is_not_submitted_twice(head: Head, cluster: Cluster, tmp_path: Path) -> None:  # noqa: F811
    head.answers[JOBS] = [{"submission_id": "r-1", "status": "PENDING"}]
    head.refusals = [NO_AGENT]
    assert post(cluster, tmp_path) == [1.0]
    assert len(head.posted) == 1


@pytest.mark.parametrize(("refusals", "waited"), [(["already exists"], 0), ([NO_AGENT] * 100, 60)])
def test_other_refusals_and_an_agent_that_never_comes_are_told(
    head: Head,  # noqa: F811
    cluster: Cluster,  # noqa: F811
    tmp_path: Path,
    refusals: list[str],
    waited: int,
) -> None:
    head.answers[JOBS] = []
    head.refusals = list(refusals)
    with pytest.raises(HeadRefused, match=refusals[0][:14]):
        post(cluster, tmp_path)
    assert len(head.posted) == 1 + waited


def known(job: str, status: str, run_directory: str) -> dict[str, object]:
    return {"submission_id": job, "status": status, "metadata": {"job_name": "r", "run_directory": run_directory}}


def test_a_name_that_ray_has_given_out_is_refused_in_one_line(head: Head, cluster: Cluster, tmp_path: Path) -> None:  # noqa: F811
    run = RunDirectory(tmp_path / "r")
    head.answers[JOBS] = [known("r", "SUCCEEDED", run.url), {"submission_id": None, "status": "RUNNING"}]
    jobs.check_free(cluster.http, run, "r-1")
    with pytest.raises(ClusterError, match=r"has had a run 'r', in .*/r, which is deleted or elsewhere: choose another run.name"):
        jobs.check_free(cluster.http, run, "r")


def test_a_run_of_the_same_name_in_another_place_is_told(head: Head, cluster: Cluster, tmp_path: Path) -> None:  # noqa: F811
    run = RunDirectory(tmp_path / "r")
    head.answers[JOBS] = [known("r", "RUNNING", run.url)]
    jobs.check_free(cluster.http, run, "r-1")
    head.answers[JOBS] = [known("r-3", "RUNNING", "/elsewhere/r")]
    with pytest.raises(ClusterError, match=r"a run 'r' is under way on this cluster already, in /elsewhere/r: choose another run.name"):
        jobs.check_free(cluster.http, run, "r")
