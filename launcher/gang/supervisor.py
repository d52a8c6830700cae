"""The supervisor of one run: `python -m launcher.gang.supervisor RUN_DIR`, a Ray job on the cluster's head.

Reserves the slices, starts the gang, watches it, starts it again from its last checkpoint when it fails, and writes down what happened.
It trains nothing and knows no model.
"""

import argparse
import functools
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from cluster.autoscaler import slice_resource
from cluster.logs import set_up_logging
from cluster.secret_place import SecretPlace
from cluster.tpu.lifecycle import provisioning_limit
from launcher.attempts import settle
from launcher.claims import Claims, Superseded
from launcher.gang.evidence import Cause, HostFailure, classify
from launcher.gang.gang import Gang, GangLost
from launcher.gang.losses import taken_slice
from launcher.gang.record import RunRecord, failure_of
from launcher.index import RunIndex
from launcher.runs import Recoveries, RunDirectory, RunState

logger = logging.getLogger(__name__)

ECHO_WINDOW_S = 0.5
"""How long after the first failure the other hosts' evidence is gathered before the gang is killed."""
STOP_GRACE_S = 120.0
"""How long the gang may take to checkpoint and end once it was asked to stop."""
ANSWER_LIMIT_S = 60.0
"""How long a runner may take to start or to kill its child."""
EXIT_STOPPED = 143
"""The exit code of a training process that was asked to end and did (128 + SIGTERM)."""

NOTICE_GRACE_S = 5.0
"""After the announced end of a host: whoever still says nothing then is gone or waits for those who are."""

CURABLE = frozenset({Cause.PREEMPTED, Cause.INFRASTRUCTURE})
"""Causes that a new attempt may cure; a bug or too small a memory would only fail again."""
BUDGETED = frozenset({Cause.INFRASTRUCTURE})
"""Of these, the ones that run.max_restarts limits: spot slices may be taken as often as the cloud likes."""


@dataclass
class Watched:
    """What the hosts of one attempt have said, by their index in the gang."""

    ended: dict[int, int] = field(default_factory=dict)
    """Exit codes of the processes that ended well, or as they were asked to."""
    failures: list[HostFailure] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    notices: list[HostFailure] = field(default_factory=list)
    """Hosts that the cloud announced to take away."""
    deadline: float = float("inf")
    """When the first of them ends."""


class Supervisor:
    """One run, from its slices to its end. `gang` is all that it knows of Ray."""

    def __init__(
        self,
        directory: RunDirectory,
        gang: Gang,
        record: RunRecord,
        max_restarts: int,
        clock: Callable[[], float] = time.time,
        *,
        taken: Callable[[list[str]], str] = lambda _: "",
        hosts_limit: float = provisioning_limit(1),
    ) -> None:
        """`clock`: seconds since the epoch. `taken`: what the cloud did to one of these slices, empty for nothing. `hosts_limit`: seconds
        that the hosts of a reserved slice may take to join.
        """
        self._directory = directory
        self._gang = gang
        self._record = record
        self._max_restarts = max_restarts
        self._clock = clock
        self._taken = taken
        self._hosts_limit = hosts_limit
        self._interrupted = False
        self._restarts = record.status.restarts  # a person who takes the run up again gives it its whole budget

    def interrupt(self, *_: object) -> None:
        """A signal handler: stop the run the way `tpu train stop` does."""
        self._interrupted = True

    def run(self) -> None:
        """Returns when the run has its final state in status.json."""
        last: tuple[int, str] | None = None
        while True:
            failure = self._attempt()
            if failure is None:
                return
            first, cause = failure
            # A signal or a lost host says nothing about the program; an error's text at the same step does.
            again = (self._record.status.step, first.error) if first.code is not None and first.code > 0 else None
            crash_loop = again is not None and again == last
            last = again
            if not self._may_recover(first, cause, crash_loop):
                return

    def _attempt(self) -> tuple[HostFailure, Cause] | None:
        """One attempt. None when the run has its final state, else the first failure and its cause."""
        try:
            if not self._gang.hosts and not self._get_hosts():
                self._end(RunState.STOPPED, "stopped while it waited for its slices")
                return None
            attempt = self._record.status.attempt
            self._record.enter(self._record.status.state, "starting processes")
            self._gang.start(attempt, ANSWER_LIMIT_S)
            return self._watch()
        except GangLost as error:
            return self._classify([HostFailure("gang", self._clock(), None, str(error))])

    def _get_hosts(self) -> bool:
        """Wait for slices and hosts, however long that takes. False when the run was stopped meanwhile."""
        self._record.enter(self._record.status.state, "waiting for slices")
        group = self._gang.reserve()
        while not self._gang.reserved(group, timeout=1.0):
            self._record.tick()
            if self._stop_asked():
                return False
        self._record.enter(self._record.status.state, "waiting for hosts")
        deadline = self._clock() + self._hosts_limit
        while not self._gang.find_hosts(group):
            self._record.tick()
            if self._clock() > deadline and self._gang.incomplete:
                words = f"not all hosts of {', '.join(self._gang.incomplete)} joined within {self._hosts_limit:.0f} s"
                self._gang.replace(self._gang.incomplete, words)
                raise GangLost(words)
            if self._stop_asked():
                return False
            time.sleep(0.25)  # Ray tells nobody when a node joins
        self._gang.place()
        names = sorted({host.slice_name for host in self._gang.hosts})
        self._record.hold_slices(names, len(self._gang.hosts))
        self._record.event("hosts", hosts=[host.name for host in self._gang.hosts])
        return True

    def _watch(self) -> tuple[HostFailure, Cause] | None:
        """Follow the gang until it ends."""
        seen = Watched()
        decide_at: float | None = None
        kill_at: float | None = None
        while len(seen.ended) + len(seen.failures) < len(self._gang.hosts) and not (decide_at is not None and self._clock() >= decide_at):
            announced = bool(seen.notices)
            for index, event in self._gang.poll(timeout=0.1 if decide_at is not None else 0.5):
                self._take(index, event, seen)
            if seen.notices and not announced:
                self._gang.terminate()  # also those whose hosts stay: they would wait for the others
            if decide_at is None and (seen.failures or self._clock() > seen.deadline + NOTICE_GRACE_S):
                decide_at = self._clock() + ECHO_WINDOW_S
            if kill_at is None and self._stop_asked():
                self._record.enter(self._record.status.state, "stopping")
                self._gang.terminate()
                kill_at = self._clock() + STOP_GRACE_S
            if kill_at is not None and self._clock() > kill_at:
                self._end(RunState.STOPPED, f"stopped; its processes did not checkpoint within {STOP_GRACE_S:.0f} s and were killed")
                return None
            self._record.tick()
        return self._conclude(seen, stopping=kill_at is not None)

    def _take(self, index: int, event: Mapping[str, Any], seen: Watched) -> None:
        host, kind = self._gang.hosts[index].name, event["event"]
        if kind == "error":
            seen.errors[index] = str(event["error"])
        elif kind == "notice":
            self._record.event("notice", host=host, kind=event["kind"], deadline=event["deadline"])
            seen.notices.append(HostFailure(host, event["time"], None, f"the cloud announced: {event['kind']}", preempted=True))
            seen.deadline = min(seen.deadline, event["deadline"])
        elif kind == "lost":
            seen.failures.append(HostFailure(host, self._clock(), None, str(event["error"]), event.get("preempted", False)))
        elif kind == "exit" and event["code"] in (0, EXIT_STOPPED):
            seen.ended[index] = event["code"]
        elif kind == "exit":
            error = seen.errors.get(index) or event["last_line"]
            seen.failures.append(HostFailure(host, event["time"], event["code"], error, sick=event.get("sick", "")))
        elif index == 0:
            self._record.apply(event)

    def _conclude(self, seen: Watched, *, stopping: bool) -> tuple[HostFailure, Cause] | None:
        stopped = [self._gang.hosts[index].name for index, code in seen.ended.items() if code == EXIT_STOPPED]
        if stopping:
            self._end(RunState.STOPPED, "stopped on request")
        elif seen.failures or (seen.notices and len(seen.ended) < len(self._gang.hosts)):
            return self._classify(seen.failures + seen.notices)
        elif stopped and seen.notices:
            return seen.notices[0], Cause.PREEMPTED
        elif stopped:  # nobody of ours asked: the machine is being shut down, or somebody sent the signal by hand
            return HostFailure(stopped[0], self._clock(), -signal.SIGTERM, ""), Cause.INFRASTRUCTURE
        else:
            self._end(RunState.SUCCEEDED, None)
        return None

    def _classify(self, failures: list[HostFailure]) -> tuple[HostFailure, Cause]:
        first, cause = classify(failures)
        slices = sorted({host.slice_name for host in self._gang.hosts})
        if cause is Cause.INFRASTRUCTURE and first.code is None and (words := self._taken(slices)):
            return replace(first, error=f"{words}; {first.error}", preempted=True), Cause.PREEMPTED
        return first, cause

    def _may_recover(self, first: HostFailure, cause: Cause, crash_loop: bool) -> bool:
        """Write the failure down and prepare the next attempt, or end the run."""
        status = self._record.status
        self._record.event("failure", host=first.host, cause=cause.value, error=first.describe, attempt=status.attempt, step=status.step)
        logger.warning("attempt %d failed at step %d on %s (%s): %s", status.attempt, status.step, first.host, cause, first.describe)
        failure = failure_of(first.host, first.describe)
        if cause not in CURABLE:
            self._end(RunState.FAILED, f"{cause.value} error", first_failure=failure)
            return False
        if crash_loop:
            self._end(RunState.FAILED, f"crash loop: the same error twice at step {status.step}", first_failure=failure)
            return False
        if cause in BUDGETED and self._restarts >= self._max_restarts:
            self._end(RunState.FAILED, f"run.max_restarts={self._max_restarts} is used up", first_failure=failure)
            return False
        self._restarts += cause in BUDGETED
        counts = {**vars(status.recoveries), cause.value: getattr(status.recoveries, cause.value) + 1}
        self._record.enter(
            RunState.RECOVERING,
            "recovering",
            attempt=status.attempt + 1,
            recoveries=Recoveries(**counts),
            first_failure=failure,
            restarts=self._restarts,
        )
        self._clear(first)
        return True

    def _clear(self, first: HostFailure) -> None:
        """Kill what is left of the gang; when a host is lost, give everything back and start with new hosts."""
        try:
            if first.sick:
                self._gang.replace([first.host.rpartition("/")[0]], f"its host {first.host} is sick: {first.sick}")
            if first.needs_new_hosts:
                raise GangLost(first.error)
            self._gang.kill(ANSWER_LIMIT_S)
        except GangLost:
            self._gang.release()
            self._record.hold_slices([], 0)

    def _end(self, state: RunState, reason: str | None, **fields: Any) -> None:
        self._gang.release()
        self._record.hold_slices([], self._record.status.hosts)
        self._record.enter(state, "", reason=reason, ended_at=self._clock(), **fields)

    def _stop_asked(self) -> bool:
        return self._interrupted or self._directory.stop_requested()


def wait_for_silence(record: RunRecord, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
    """Return when no training process of a supervisor before this one lives any more: the run is never executed twice at a time."""
    if clock() < record.status.quiet_at:
        record.enter(record.status.state, "waiting for the end of what was left")
    while clock() < record.status.quiet_at:
        record.tick()
        sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", help="a local path or gs://")
    parser.add_argument("--job", required=True)
    parser.add_argument("--index", required=True, help="where the cluster's unfinished runs are listed")
    parser.add_argument("--secrets", type=SecretPlace.from_json, metavar="JSON", help="where they are, not what they are")
    arguments = parser.parse_args()
    directory = RunDirectory(arguments.run_dir)
    set_up_logging(f"supervisor-{directory.run_id}", terminal=logging.INFO)
    config = directory.config()
    status = directory.status()
    assert status is not None, f"{directory.url} has no status.json"
    if not Claims(directory.files).holds(arguments.job):
        logger.warning("somebody else has taken the run over; job %s does nothing", arguments.job)
        return
    record = RunRecord(directory, replace(status, job=arguments.job), time.time, config.slices.usd_per_hour)
    record.enter(RunState.STARTING if status.state is RunState.QUEUED else RunState.RECOVERING, "connecting to Ray")
    ray.init(address=os.environ["RAY_ADDRESS"], namespace=directory.run_id, log_to_driver=False, logging_level=logging.WARNING)
    gang = Gang(directory, config.slices, slice_resource(config.slices), arguments.secrets)
    supervisor = Supervisor(
        directory,
        gang,
        record,
        config.run.max_restarts,
        taken=functools.partial(taken_slice, config.cluster.name),
        hosts_limit=provisioning_limit(config.slices.hosts),
    )
    signal.signal(signal.SIGTERM, supervisor.interrupt)
    try:
        wait_for_silence(record, time.time, time.sleep)
        supervisor.run()
    except Superseded as error:
        logger.warning("ending without a word more: %s", error)
        gang.release()
        return
    except BaseException as error:
        # The outermost loop: whatever went wrong here must be found in the run directory, not in the log of a job that may be gone.
        logger.exception("the supervisor failed")
        record.enter(RunState.FAILED, "", reason=f"the supervisor failed: {type(error).__name__}: {error}", ended_at=time.time())
        raise
    finally:
        settle(directory, RunIndex(arguments.index))
    print(json.dumps({"run": directory.run_id, "state": record.status.state}))


if __name__ == "__main__":
    main()
