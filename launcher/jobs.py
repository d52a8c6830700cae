"""Ray Jobs: a run's supervisor is one job on the cluster's head.

Spoken over the dashboard's HTTP interface, so that a command line need not import Ray (a second and 100 MB).
"""

import json
import shlex
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from cluster.errors import ClusterError
from cluster.ray_http import HeadRefused, RayHttp
from cluster.secret_place import SecretPlace
from cluster.state import private_dir, write_atomic
from cluster.token import keep_run_secret
from launcher.environment import present
from launcher.runs import RunDirectory

if TYPE_CHECKING:  # supervisors import this module, and need nothing of a whole cluster
    from cluster.clusters import Cluster

AGENT_S = 60.0
"""How long the head may take until it can start jobs."""
_NO_AGENT = "No available agent to submit job"
"""Ray's words, of its dashboard's job head."""
ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})


def job_id(run: RunDirectory, attempt: int) -> str:
    """A run that is taken up again is a new job: Ray refuses an id that it has seen."""
    return run.run_id if attempt == 0 else f"{run.run_id}-{attempt}"


def post(
    http: RayHttp,
    run: RunDirectory,
    job: str,
    secrets: SecretPlace | None,
    index: str,
    about: Mapping[str, str] | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Start the run's supervisor. `index`: where the cluster's runs are listed (launcher/index.py). `about`: what Ray's dashboard shows
    of the job beside its name.

    Raises ClusterError when the head refuses or does not answer. A head that has just come up, on a machine that is busy, has no agent yet
    that starts jobs: that is waited for.

    No entrypoint resources: such a job's driver stays on the head, where no preemption can take it.
    """
    arguments = [run.url, "--job", job, "--index", index]
    if secrets is not None:
        arguments += ["--secrets", secrets.to_json()]
    entrypoint = f'exec "$PODLAUNCH_PYTHON" -m launcher.gang.supervisor {shlex.join(arguments)}'
    metadata = {"job_name": run.run_id, "run_directory": run.url, **(about or {})}
    deadline = clock() + AGENT_S
    while True:
        try:
            http.post("/api/jobs/", {"entrypoint": entrypoint, "submission_id": job, "metadata": metadata})
        except HeadRefused as error:
            if _NO_AGENT not in str(error) or clock() >= deadline:
                raise
        else:
            return
        sleep(1.0)
        if job in living(http):  # the agent had it, and was too slow to say so
            return


def check_free(http: RayHttp, run: RunDirectory, job: str) -> None:
    """Raises ClusterError when `job` cannot be submitted: Ray refuses an id for as long as it knows a job by it, be its run's directory
    deleted or not; or when the head does not answer.
    """
    for known in http.get("/api/jobs/"):
        about = known.get("metadata") or {}
        place = about.get("run_directory")
        if known["status"] not in ENDED and about.get("job_name") == run.run_id and place != run.url:
            raise ClusterError(f"a run {run.run_id!r} is under way on this cluster already, in {place}: choose another run.name")
        if known.get("submission_id") == job:
            raise ClusterError(
                f"this cluster has had a run {run.run_id!r}, in {place}, which is deleted or elsewhere: choose another run.name"
            )


def ending(http: RayHttp, job: str) -> str:
    """How the job ended, in one line of Ray's. Raises ClusterError when the head does not answer, HeadRefused when it knows no such job."""
    lines = str(http.get(f"/api/jobs/{job}").get("message") or "").strip().splitlines()
    return lines[0] if lines else "Ray tells no reason"


def run_directories(cluster: "Cluster") -> list[str]:
    """The places of all runs whose supervisors are this cluster's jobs, finished ones included."""
    jobs = cluster.http.get("/api/jobs/")
    return sorted({str(directory) for job in jobs if (directory := (job.get("metadata") or {}).get("run_directory"))})


def living(http: RayHttp) -> frozenset[str]:
    """The ids of all jobs that are pending or running. Raises ClusterError when the head does not answer."""
    return frozenset(job["submission_id"] for job in http.get("/api/jobs/") if job["status"] not in ENDED and job.get("submission_id"))


def store_secrets(cluster: "Cluster", run: RunDirectory, names: list[str]) -> tuple[SecretPlace | None, list[str]]:
    """Where the values of those variables are that are set, and which these are.

    A 0600 file, or a secret of the cluster's where its hosts do not see this machine's files. The job's command line and metadata, which
    the dashboard shows, carry its name only.
    """
    values = present(names)
    if not values:
        return None, []
    if cluster.config.shares_files:
        path = private_dir(cluster.folder / "secrets") / f"{run.run_id}.json"
        write_atomic(path, json.dumps(values))
        return SecretPlace(file=str(path)), list(values)
    return keep_run_secret(cluster.config, run.run_id, json.dumps(values), cluster.connect(cluster.config).secrets), list(values)
