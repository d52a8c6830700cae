"""Ray Jobs: a run's supervisor is one job on the cluster's head.

Spoken over the dashboard's HTTP interface, so that a command line need not import Ray (a second and 100 MB).
"""

import json
import shlex

from cluster.clusters import Cluster
from cluster.secret_place import SecretPlace
from cluster.state import private_dir, write_atomic
from cluster.token import keep_run_secret
from launcher.environment import present
from launcher.runs import RunDirectory

ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})


def job_id(run: RunDirectory, attempt: int) -> str:
    """A run that is taken up again is a new job: Ray refuses an id that it has seen."""
    return run.run_id if attempt == 0 else f"{run.run_id}-{attempt}"


def submit(cluster: Cluster, run: RunDirectory, attempt: int, secrets: list[str]) -> str:
    """Start the run's supervisor. Returns the job's id. Raises ClusterError when the head refuses or does not answer.

    No entrypoint resources: such a job's driver stays on the head, where no preemption can take it.
    """
    job = job_id(run, attempt)
    arguments = [run.url, "--job", job]
    if values := present(secrets):
        arguments += ["--secrets", _store_secrets(cluster, run, values).to_json()]
    entrypoint = f'exec "$PODLAUNCH_PYTHON" -m launcher.gang.supervisor {shlex.join(arguments)}'
    metadata = {"name": run.run_id, "run_directory": run.url}
    cluster.http.post("/api/jobs/", {"entrypoint": entrypoint, "submission_id": job, "metadata": metadata})
    return job


def status(cluster: Cluster, job: str) -> str:
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED. Raises ClusterError when the head does not answer or knows no such job."""
    return str(cluster.http.get(f"/api/jobs/{job}")["status"])


def logs(cluster: Cluster, job: str) -> str:
    """What the supervisor has printed so far."""
    return str(cluster.http.get(f"/api/jobs/{job}/logs")["logs"])


def run_directories(cluster: Cluster) -> list[str]:
    """The places of all runs whose supervisors are this cluster's jobs, finished ones included."""
    jobs = cluster.http.get("/api/jobs/")
    return sorted({str(directory) for job in jobs if (directory := (job.get("metadata") or {}).get("run_directory"))})


def _store_secrets(cluster: Cluster, run: RunDirectory, values: dict[str, str]) -> SecretPlace:
    """A 0600 file, or a secret of the cluster's where its hosts do not see this machine's files. The job's command line and metadata, which
    the dashboard shows, carry its name only.
    """
    if cluster.config.shares_files:
        path = private_dir(cluster.folder / "secrets") / f"{run.run_id}.json"
        write_atomic(path, json.dumps(values))
        return SecretPlace(file=str(path))
    return keep_run_secret(cluster.config, run.run_id, json.dumps(values), cluster.connect(cluster.config).secrets)
