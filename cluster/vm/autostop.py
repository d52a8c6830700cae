"""When a cluster ends itself: no run was pending or running for so long. Ray's jobs are the cluster's runs; nothing else counts as use."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import PodlaunchError
from cluster.ray_http import RayHttp

logger = logging.getLogger(__name__)

_ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})


@dataclass(frozen=True)
class Job:
    going_on: bool
    """Pending or running."""
    ended: float | None
    """Seconds since the epoch, as Ray has it."""


def list_jobs(http: RayHttp) -> list[Job]:
    """Every job that Ray's head knows. Raises ClusterError when it does not answer."""
    return [_job(row) for row in http.get("/api/jobs/")]


class IdleWatch:
    """Knows since when nobody has used the cluster. The head's start counts as use: the cluster is at least `limit` seconds old."""

    def __init__(self, limit: float, jobs: Callable[[], Sequence[Job]], clock: Callable[[], float]) -> None:
        """`clock`: seconds since the epoch."""
        self._limit, self._jobs, self._clock = limit, jobs, clock
        self._last_use = clock()

    def due(self) -> bool:
        """One look. A job server that does not answer proves nothing, so nothing is due then."""
        try:
            jobs = self._jobs()
        except PodlaunchError as error:
            logger.info("whether runs go on cannot be seen now: %s", error)
            return False
        now = self._clock()
        ends = [job.ended for job in jobs if job.ended is not None]
        # A run that came and went between two looks is known by its end.
        self._last_use = now if any(job.going_on for job in jobs) else max([self._last_use, *ends])
        return now - self._last_use >= self._limit


def interval(limit: float) -> float:
    """Seconds between two looks."""
    return min(30.0, max(0.5, limit / 20))


def watch(idle: IdleWatch, pause: Callable[[], bool], act: Callable[[], bool]) -> None:
    """Call `act` whenever it is due, until it returns True. `pause` waits for the next look and says whether to go on."""
    while pause():
        if idle.due() and act():
            return


def watch_in_background(limit: float, http: RayHttp, clock: Callable[[], float], act: Callable[[], bool]) -> None:
    """A thread that lives as long as the process."""
    idle = IdleWatch(limit, lambda: list_jobs(http), clock)
    never = threading.Event()
    threading.Thread(target=watch, args=(idle, lambda: not never.wait(interval(limit)), act), name="autostop", daemon=True).start()


def _job(row: dict[str, Any]) -> Job:
    ended = row.get("end_time")
    return Job(row["status"] not in _ENDED, None if ended is None else ended / 1000)
