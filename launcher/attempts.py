"""A run's next attempt, and the end of a run that no supervisor ends. Shared by the commands and by the keeper on the head.

Both claim the run first, so that whoever held it until now writes and publishes nothing any more.
"""

import dataclasses
import time
from collections.abc import Callable

from cluster.ray_http import RayHttp
from launcher import jobs
from launcher.claims import Claims
from launcher.gang.lease import SILENCE_S
from launcher.index import Entry, RunIndex
from launcher.runs import AT_REST, FINAL, RunDirectory, RunState, RunStatus


def next_attempt(run: RunDirectory) -> int:
    """The number of the next attempt; the first is 0."""
    status, claim = run.status(), Claims(run.files).newest()
    return 1 + max(-1 if status is None else status.attempt, -1 if claim is None else claim.attempt)


def claim_next(run: RunDirectory) -> tuple[int, str] | None:
    """The next attempt and its job's id, or None when somebody else was faster."""
    attempt = next_attempt(run)
    job = jobs.job_id(run, attempt)
    return (attempt, job) if Claims(run.files).claim(attempt, job) else None


def submit_next(run: RunDirectory, entry: Entry, index: RunIndex, http: RayHttp, status: RunStatus) -> str:
    """Start the supervisor of an attempt that is claimed and that `status` describes. Returns the job's id.

    Raises ClusterError when the head refuses or does not answer; the run is in its index then.
    """
    assert status.job is not None
    # First of all: who is killed in between leaves no run that is QUEUED and that nobody looks after.
    index.write(dataclasses.replace(entry, submitted_at=status.updated_at))
    run.write_status(status)
    about = {"cluster": status.cluster, "attempt": str(status.attempt), "total_steps": str(status.total_steps)}
    jobs.post(http, run, status.job, entry.secrets, index.url, about)
    return status.job


def submit_again(
    run: RunDirectory, entry: Entry, index: RunIndex, http: RayHttp, reason: str, clock: Callable[[], float] = time.time
) -> str | None:
    """Go on with a run whose supervisor is lost. What it has spent stays spent. Returns the job's id, None when somebody else was faster
    or the run has ended. Raises ClusterError.
    """
    claimed = claim_next(run)
    status = run.status()  # after the claim: nobody writes an end any more
    if claimed is None or status is None or status.state in AT_REST:
        return None
    attempt, job = claimed
    now = clock()
    run.append_event({"time": now, "event": "supervisor_lost", "attempt": status.attempt, "step": status.step, "reason": reason})
    again = dataclasses.replace(
        status.accounted_until(now),
        attempt=attempt,
        job=job,
        phase="starting a supervisor",
        slices=[],
        quiet_at=_quiet_at(run, status, now),
    )
    if status.state is not RunState.QUEUED:
        recoveries = dataclasses.replace(status.recoveries, infrastructure=status.recoveries.infrastructure + 1)
        again = dataclasses.replace(again, state=RunState.RECOVERING, recoveries=recoveries)
        run.append_event({"time": now, "event": "state", "state": again.state.value, "attempt": attempt})
    return submit_next(run, entry, index, http, again)


def end_run(run: RunDirectory, state: RunState, reason: str, index: RunIndex, clock: Callable[[], float] = time.time) -> None:
    """Give an unfinished run whose supervisor is gone its final state, or suspend it; one that was finished meanwhile is left as it is.

    Its secrets are deleted, and its entry in the index unless it is suspended.
    """
    status = run.status()
    if status is not None and status.state not in FINAL and status.state is not state:
        while claim_next(run) is None:
            """Somebody was faster; the run's end counts whoever that was."""
        status = run.status()  # after the claim: nobody else writes it any more
        assert status is not None
    if status is not None and status.state not in FINAL and status.state is not state:
        now = clock()
        ended_at = None if state is RunState.SUSPENDED else now
        accounted = status.accounted_until(now)
        fresh = dataclasses.replace(accounted, state=state, phase="", reason=reason, slices=[], ended_at=ended_at)
        run.write_status(dataclasses.replace(fresh, quiet_at=_quiet_at(run, status, now)))
        run.append_event({"time": now, "event": "state", "state": state.value, "attempt": status.attempt, "reason": reason})
    settle(run, index)


def _quiet_at(run: RunDirectory, status: RunStatus, now: float) -> float:
    """`now`: its supervisor is gone, or nobody would be here."""
    return max(status.quiet_at, min(now, status.updated_at + run.files.unheard_s) + SILENCE_S)


def settle(run: RunDirectory, index: RunIndex) -> None:
    """Delete the secrets of a run that has ended or is suspended, and forget it when it has ended. Raises PodlaunchError."""
    status = run.status()
    if status is None or status.state in FINAL:
        index.forget(run)
    elif status.state is RunState.SUSPENDED:
        index.suspend(run)
