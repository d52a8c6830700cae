"""Whether anybody looks after a run that a command follows, and what a person should know of it. Writes nothing: others keep the run."""

import logging
import time
from collections.abc import Callable

from cluster import clusters
from cluster.clusters import Cluster
from cluster.errors import ClusterError, PodlaunchError
from launcher import jobs
from launcher.runs import FINAL, RunDirectory, RunState, RunStatus

logger = logging.getLogger(__name__)

LOOK_S = 3.0
PATIENCE = 3
"""So many looks in a row have to find a run without a head: who stops a cluster writes its runs' states at about the same time."""


class HeadGone(ClusterError):
    """Nobody but a person brings the run's head back."""


class SupervisorWatch:
    """Called all the time while a run is followed; looks every few seconds. Its answer is what a person should know now, or None.

    Raises HeadGone when the run only goes on once a person has done something.
    """

    def __init__(
        self,
        cluster: str,
        run: RunDirectory,
        clock: Callable[[], float] = time.monotonic,
        find: Callable[[str], Cluster | None] = clusters.find,
    ) -> None:
        """`cluster`: its name. `clock`: seconds."""
        self._name, self._run, self._clock, self._find = cluster, run, clock, find
        self._known: Cluster | None = None
        self._looked = clock()
        self._gone = 0
        self._said: str | None = None

    def __call__(self) -> str | None:
        if self._clock() - self._looked >= LOOK_S:
            self._looked = self._clock()
            self._said = self._look()
        return self._said

    def _look(self) -> str | None:
        status = self._run.status()
        if status is None or status.state in FINAL:
            return None
        known = self._find(self._name)
        if known != self._known:  # the one that is known already is connected
            self._known = known
        if self._known is None or self._known.ended is not None:
            give_up = f"end the run with `tpu train stop {self._run.url}`, then go on with it by run.resume=true"
            return self._missing(f"nothing is known here of cluster {self._name!r}, which the run is on; if it was stopped, {give_up}")
        try:
            lives = status.job in jobs.living(self._known.http)
        except PodlaunchError:
            return self._silent(self._known)
        self._gone = 0
        return None if lives else _without_supervisor(status)

    def _silent(self, cluster: Cluster) -> str | None:
        """The head does not answer."""
        if not may_come_back(cluster):
            back = "`tpu start` brings it back, and the run goes on by itself from its last checkpoint"
            give_up = f"or give the run up with `tpu train stop {self._run.url}`"
            return self._missing(f"the head of cluster {cluster.name!r} is gone: {back}; {give_up}")
        self._gone = 0
        return f"the head of cluster {cluster.name!r} does not answer; the run goes on when it is back"

    def _missing(self, words: str) -> str | None:
        self._gone += 1
        if self._gone < PATIENCE:
            return None
        raise HeadGone(words)


def _without_supervisor(status: RunStatus) -> str | None:
    if status.state in (RunState.QUEUED, RunState.SUSPENDED):
        return None  # on its way
    return "the run's supervisor is gone; the keeper on the head starts it again"


def looked_after(cluster: Cluster | None) -> bool:
    """Whether a keeper on the head ends or goes on with the cluster's runs, now or when Ray is back. True when nobody can tell now."""
    return cluster is not None and cluster.ended is None and may_come_back(cluster)


def may_come_back(cluster: Cluster) -> bool:
    """Whether something is there that keeps the head's Ray alive. True when nobody can tell now."""
    try:
        return cluster.alive()
    except PodlaunchError as error:
        logger.info("whether the head lives cannot be seen: %s", error)
        return True
