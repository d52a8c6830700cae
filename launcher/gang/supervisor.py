"""The supervisor of one run: `python -m launcher.gang.supervisor RUN_DIR`, a Ray job on the cluster's head.

Reserves the slices, starts the gang, watches it, starts it again from its last checkpoint when it fails, and writes down what happened.
It trains nothing and knows no model.
"""

import argparse
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from cluster.autoscaler import slice_resource
from cluster.logs import set_up_logging
from cluster.secret_place import SecretPlace
from launcher.gang.evidence import Cause, HostFailure, classify
from launcher.gang.gang import Gang, GangLost
from launcher.gang.record import RunRecord, failure_of
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

BUDGETED = (Cause.INFRASTRUCTURE,)
"""Causes that a new attempt may cure; a bug or too small a memory would only fail again."""


class Supervisor:
    """One run, from its slices to its end. `gang` is all that it knows of Ray."""

    def __init__(
        self, directory: RunDirectory, gang: Gang, record: RunRecord, max_restarts: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._directory = directory
        self._gang = gang
        self._record = record
        self._max_restarts = max_restarts
        self._clock = clock
        self._interrupted = False
        self._restarts = 0  # of this job: a run that is taken up again has its whole budget

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
            return HostFailure("gang", self._clock(), None, str(error)), Cause.INFRASTRUCTURE

    def _get_hosts(self) -> bool:
        """Wait for slices and hosts, however long that takes. False when the run was stopped meanwhile."""
        self._record.enter(self._record.status.state, "waiting for slices")
        group = self._gang.reserve()
        while not self._gang.reserved(group, timeout=1.0):
            self._record.tick()
            if self._stop_asked():
                return False
        self._record.enter(self._record.status.state, "waiting for hosts")
        while not self._gang.find_hosts(group):
            self._record.tick()
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
        ended: dict[int, int] = {}
        failures: list[HostFailure] = []
        errors: dict[int, str] = {}
        decide_at: float | None = None
        kill_at: float | None = None
        while len(ended) + len(failures) < len(self._gang.hosts) and not (decide_at is not None and self._clock() >= decide_at):
            for index, event in self._gang.poll(timeout=0.1 if decide_at is not None else 0.5):
                self._take(index, event, ended, failures, errors)
            if failures and decide_at is None:
                decide_at = self._clock() + ECHO_WINDOW_S
            if kill_at is None and self._stop_asked():
                self._record.enter(self._record.status.state, "stopping")
                self._gang.terminate()
                kill_at = self._clock() + STOP_GRACE_S
            if kill_at is not None and self._clock() > kill_at:
                self._end(RunState.STOPPED, f"stopped; its processes did not checkpoint within {STOP_GRACE_S:.0f} s and were killed")
                return None
            self._record.tick()
        return self._conclude(ended, failures, stopping=kill_at is not None)

    def _take(
        self, index: int, event: Mapping[str, Any], ended: dict[int, int], failures: list[HostFailure], errors: dict[int, str]
    ) -> None:
        host, kind = self._gang.hosts[index].name, event["event"]
        if kind == "error":
            errors[index] = str(event["error"])
        elif kind == "lost":
            failures.append(HostFailure(host, self._clock(), None, str(event["error"])))
        elif kind == "exit" and event["code"] in (0, EXIT_STOPPED):
            ended[index] = event["code"]
        elif kind == "exit":
            failures.append(HostFailure(host, event["time"], event["code"], errors.get(index) or event["last_line"]))
        elif index == 0:
            self._record.apply(event)

    def _conclude(self, ended: Mapping[int, int], failures: list[HostFailure], *, stopping: bool) -> tuple[HostFailure, Cause] | None:
        if failures and not stopping:
            return classify(failures)
        if stopping or EXIT_STOPPED in ended.values():
            self._end(RunState.STOPPED, "stopped on request")
        else:
            self._end(RunState.SUCCEEDED, None)
        return None

    def _may_recover(self, first: HostFailure, cause: Cause, crash_loop: bool) -> bool:
        """Write the failure down and prepare the next attempt, or end the run."""
        status = self._record.status
        self._record.event("failure", host=first.host, cause=cause.value, error=first.describe, attempt=status.attempt, step=status.step)
        logger.warning("attempt %d failed at step %d on %s (%s): %s", status.attempt, status.step, first.host, cause, first.describe)
        failure = failure_of(first.host, first.describe)
        if cause not in BUDGETED:
            self._end(RunState.FAILED, f"{cause.value} error", first_failure=failure)
            return False
        if crash_loop:
            self._end(RunState.FAILED, f"crash loop: the same error twice at step {status.step}", first_failure=failure)
            return False
        if self._restarts >= self._max_restarts:
            self._end(RunState.FAILED, f"run.max_restarts={self._max_restarts} is used up", first_failure=failure)
            return False
        self._restarts += 1
        counts = {**vars(status.recoveries), cause.value: getattr(status.recoveries, cause.value) + 1}
        self._record.enter(
            RunState.RECOVERING, "recovering", attempt=status.attempt + 1, recoveries=Recoveries(**counts), first_failure=failure
        )
        self._clear(first)
        return True

    def _clear(self, first: HostFailure) -> None:
        """Kill what is left of the gang; when a host is lost, give everything back and start with new hosts."""
        try:
            if first.code is None:
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--job", required=True)
    parser.add_argument("--secrets", type=SecretPlace.from_json, metavar="JSON", help="where they are, not what they are")
    arguments = parser.parse_args()
    directory = RunDirectory(arguments.run_dir)
    set_up_logging(f"supervisor-{directory.run_id}", terminal=logging.INFO)
    config = directory.config()
    status = directory.status()
    assert status is not None, f"{directory.path} has no status.json"
    record = RunRecord(directory, replace(status, job=arguments.job), time.time, config.cluster.usd_per_hour)
    record.enter(RunState.STARTING, "connecting to Ray")
    ray.init(address=os.environ["RAY_ADDRESS"], namespace=directory.run_id, log_to_driver=False, logging_level=logging.WARNING)
    gang = Gang(directory, config.cluster, slice_resource(config.cluster), arguments.secrets)
    supervisor = Supervisor(directory, gang, record, config.run.max_restarts)
    signal.signal(signal.SIGTERM, supervisor.interrupt)
    try:
        supervisor.run()
    except BaseException as error:
        # The outermost loop: whatever went wrong here must be found in the run directory, not in the log of a job that may be gone.
        logger.exception("the supervisor failed")
        record.enter(RunState.FAILED, "", reason=f"the supervisor failed: {type(error).__name__}: {error}", ended_at=time.time())
        raise
    finally:
        if arguments.secrets is not None:
            arguments.secrets.delete()
    print(json.dumps({"run": directory.run_id, "state": record.status.state}))


if __name__ == "__main__":
    main()
