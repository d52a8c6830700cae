"""The keeper of a cluster's runs: `python -m launcher.gang.keeper INDEX`, one process beside each head.

A run whose supervisor is gone although the run has not ended (its process died, or the head with all that Ray knew) goes on: the keeper
submits its next attempt, from the code and the configuration in the run directory. It is started and kept alive by the head's agent, which
tells it by its environment (cluster/vm/companion.py) which cluster this is and where the head answers.
"""

import dataclasses
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from enum import Enum, StrEnum, auto

from cluster.errors import PodlaunchError
from cluster.logs import set_up_logging
from cluster.ray_http import HeadRefused, RayHttp
from cluster.vm.companion import Beside
from launcher import jobs
from launcher.attempts import end_run, settle, submit_again
from launcher.claims import Claims
from launcher.index import Entry, RunIndex
from launcher.runs import FINAL, RunDirectory, RunState, RunStatus, StopRequest

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""Between two looks: one request to the head, and one small file a run."""
SUBMIT_GRACE_S = 45.0
"""A command that submits a run writes it down first; for so long its job may be on its way."""
MAX_LIVES = 5
"""So many supervisors lost in a row, without a step done that none before had done: a next one would be lost too."""
HEALTHY_S = 600.0
"""A supervisor that lived so long was well, whether or not there were slices for it to train on."""
LONGEST_PAUSE_S = 30.0


class Standing(Enum):
    """How a run stands, by its run directory."""

    ENDED = auto()
    SUSPENDED = auto()
    """Until its cluster is brought up again by a command."""
    ELSEWHERE = auto()
    """It went on on another cluster."""
    STOPPING = auto()
    """It was asked to stop."""
    FRESH = auto()
    """A command may be submitting it right now."""
    UNFINISHED = auto()


class Verdict(StrEnum):
    """What the keeper does about a run."""

    LEAVE = auto()
    SETTLE = auto()
    """Forget it, or what a suspended run no longer needs."""
    STOP = auto()
    RESUBMIT = auto()


VERDICTS: Mapping[tuple[Standing, bool], Verdict] = {  # (how it stands, whether its supervisor lives)
    (Standing.ENDED, True): Verdict.SETTLE,
    (Standing.ENDED, False): Verdict.SETTLE,
    (Standing.SUSPENDED, True): Verdict.LEAVE,
    (Standing.SUSPENDED, False): Verdict.SETTLE,
    (Standing.ELSEWHERE, True): Verdict.LEAVE,
    (Standing.ELSEWHERE, False): Verdict.LEAVE,
    (Standing.STOPPING, True): Verdict.LEAVE,
    (Standing.STOPPING, False): Verdict.STOP,
    (Standing.FRESH, True): Verdict.LEAVE,
    (Standing.FRESH, False): Verdict.LEAVE,
    (Standing.UNFINISHED, True): Verdict.LEAVE,
    (Standing.UNFINISHED, False): Verdict.RESUBMIT,
}


def standing(status: RunStatus | None, cluster: str, *, stop_asked: bool, now: float) -> Standing:
    """`now`: seconds since the epoch."""
    if status is None or status.state in FINAL:
        return Standing.ENDED
    if status.cluster != cluster:
        return Standing.ELSEWHERE
    if status.state is RunState.SUSPENDED:
        return Standing.SUSPENDED
    if stop_asked:
        return Standing.STOPPING
    if status.state is RunState.QUEUED and now - status.updated_at < SUBMIT_GRACE_S:
        return Standing.FRESH
    return Standing.UNFINISHED


def claimed_anew(run: RunDirectory, status: RunStatus | None) -> bool:
    """Whether somebody has claimed a next attempt of a run that has no such attempt yet."""
    claim = Claims(run.files).newest()
    return claim is not None and (status is None or claim.attempt > status.attempt)


def lost_again(entry: Entry, status: RunStatus, now: float) -> Entry:
    """The run's entry once its supervisor is lost: how many were lost in a row for nothing."""
    fruitless = status.step <= entry.best_step and now - entry.submitted_at < HEALTHY_S
    return dataclasses.replace(entry, lives=entry.lives + 1 if fruitless else 1, best_step=max(entry.best_step, status.step))


def pause(lives: int) -> float:
    """Seconds after a submission before which the next one is not tried; the first comes at once."""
    return 0.0 if lives < 2 else min(LONGEST_PAUSE_S, 2.0**lives)


class Keeper:
    """One cluster's runs."""

    def __init__(self, cluster: str, index: RunIndex, http: RayHttp, clock: Callable[[], float] = time.time) -> None:
        """`clock`: seconds since the epoch."""
        self._cluster, self._index, self._http, self._clock = cluster, index, http, clock

    def look(self) -> None:
        """Look after every run once. A head that does not answer proves nothing about the runs, so nothing is done then.

        Raises PodlaunchError when the head does not answer.
        """
        entries = self._index.entries()
        if not entries:
            return
        living = jobs.living(self._http)
        for entry in entries:
            try:
                self._look_after(entry, living)
            except (PodlaunchError, OSError, ValueError) as error:
                logger.warning("run %s: %s", entry.run_directory, error)

    def _look_after(self, entry: Entry, living: frozenset[str]) -> None:
        run = self._index.run(entry)
        status = run.status()
        now = self._clock()
        stands = standing(status, self._cluster, stop_asked=run.stop_requested() is not None, now=now)
        if stands in (Standing.ENDED, Standing.SUSPENDED) and now - entry.submitted_at < SUBMIT_GRACE_S and claimed_anew(run, status):
            stands = Standing.FRESH
        verdict = VERDICTS[stands, status is not None and status.job in living]
        if verdict is Verdict.SETTLE:
            settle(run, self._index)
        elif verdict is Verdict.STOP:
            state = RunState.SUSPENDED if run.stop_requested() is StopRequest.SUSPEND else RunState.STOPPED
            end_run(run, state, "stopped on request, after its supervisor was lost", self._index, self._clock)
        elif verdict is Verdict.RESUBMIT:
            assert status is not None
            self._resubmit(entry, status, now)

    def _resubmit(self, entry: Entry, status: RunStatus, now: float) -> None:
        if now < entry.submitted_at + pause(entry.lives):
            return
        words = self._last_words(status)
        entry = lost_again(entry, status, now)
        if entry.lives > MAX_LIVES:
            reason = (
                f"its supervisor was lost {entry.lives} times in a row without a step further than {entry.best_step}; the last: {words}"
            )
            end_run(self._index.run(entry), RunState.FAILED, reason, self._index, self._clock)
            logger.warning("run %s: %s", status.run_id, reason)
        elif (job := submit_again(self._index.run(entry), entry, self._index, self._http, words, self._clock)) is not None:
            logger.warning("run %s goes on as job %s at step %d: %s", status.run_id, job, status.step, words)

    def _last_words(self, status: RunStatus) -> str:
        """What is known of the end of its supervisor."""
        if status.job is None:
            return "it was never submitted"
        try:
            return f"its supervisor ended: {jobs.ending(self._http, status.job)}"
        except HeadRefused:
            return "the head was lost"  # this one knows no such job


def main() -> None:
    beside = Beside.from_environment()
    set_up_logging(f"keeper-{beside.cluster}", terminal=None)
    index = RunIndex(sys.argv[1])
    keeper = Keeper(beside.cluster, index, RayHttp(beside.url, beside.token_file))
    ending = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ending.set())
    told = ""
    while not ending.wait(max(LOOK_S, index.poll_s)):
        try:
            keeper.look()
            told = ""
        except PodlaunchError as error:
            if not told:
                logger.info("waiting for the head: %s", error)
            told = str(error)


if __name__ == "__main__":
    main()
