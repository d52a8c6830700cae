"""The supervisor of one run: `python -m launcher.gang.supervisor RUN_DIR`, a Ray job on the cluster's head.

Reserves the slices, starts the gang, watches it, starts it again from its last checkpoint when it fails, and writes down what happened.
What follows from what is decided in launcher/gang/states.py (the table), evidence.py (the cause) and budgets.py (whether to go on); here
it is seen and carried out. It trains nothing and knows no model.
"""

import argparse
import functools
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ray

from cluster.autoscaler import slice_resource
from cluster.cloud_errors import CloudError
from cluster.logs import set_up_logging
from cluster.secret_place import SecretPlace
from cluster.tpu.lifecycle import Life, provisioning_limit
from cluster.tpu.losses import read_standing
from launcher.attempts import settle
from launcher.claims import Claims, Superseded
from launcher.config import RunConfig
from launcher.gang.attempt import Attempt
from launcher.gang.budgets import Budgets, Verdict
from launcher.gang.desk import Desk, Unwritten
from launcher.gang.evidence import Cause, HostFailure, is_echo
from launcher.gang.gang import Gang, GangLost
from launcher.gang.gauges import Gauges, RunGauges
from launcher.gang.losses import taken_slice
from launcher.gang.profiling import ANSWERS, Profiling
from launcher.gang.record import RunRecord, failure_of
from launcher.gang.states import BEGIN, ENDS, PHASES, SHOWN, TRANSITIONS, Effect, Happening, Stage, Step
from launcher.gang.stragglers import Stragglers
from launcher.gang.watchdog import Watchdog
from launcher.goodput import Phase
from launcher.index import RunIndex
from launcher.limits import limit_reached
from launcher.runs import Recoveries, RunDirectory, RunState, StopRequest

logger = logging.getLogger(__name__)

ECHO_WINDOW_S = 0.5
"""How long after the first failure the other hosts' evidence is gathered before the gang is killed."""
STOP_GRACE_S = 120.0
"""How long the gang may take to checkpoint and end once it was asked to stop."""
ANSWER_LIMIT_S = 60.0
"""How long a runner may take to start or to kill its child."""
STACKS_LIMIT_S = 30.0
"""How long the runners of a gang that hangs may take to look at their processes."""
NOTICE_GRACE_S = 5.0
"""After the announced end of a host: whoever still says nothing then is gone or waits for those who are."""
EXIT_UNFINISHED = 1
"""The exit code of a supervisor that leaves its run to the next one."""
POLL_S = 0.5
"""How long one look at processes and at the clock may take."""

_STOPPED_WHILE = {
    Stage.RESERVING: "it waited for its slices",
    Stage.JOINING: "it waited for its hosts",
    Stage.PAUSING: "it recovered",
    Stage.MOVING: "it recovered",
}


class Supervisor:
    """One run, from its slices to its end. `gang` is all that it knows of Ray."""

    def __init__(
        self,
        directory: RunDirectory,
        gang: Gang,
        record: RunRecord,
        config: RunConfig,
        clock: Callable[[], float] = time.time,
        *,
        taken: Callable[[list[str]], str] = lambda _: "",
        hosts_limit: float = provisioning_limit(1),
        wait: Callable[[float], object] | None = None,
        gauges: RunGauges | None = None,
    ) -> None:
        """`clock`: seconds since the epoch. `taken`: what the cloud did to one of these slices, empty for nothing. `hosts_limit`: seconds
        that the hosts of a reserved slice may take to join. `wait`: returns after so many seconds, or when the run is interrupted.
        `gauges`: who shows the run to Prometheus.
        """
        self._directory = directory
        self._gang = gang
        self._record = record
        self._config = config
        self._budgets = Budgets(config.budget, record.status.spent)
        self._clock = clock
        self._taken = taken
        self._hosts_limit = hosts_limit
        self._interrupted = threading.Event()
        self._wait = wait or self._interrupted.wait
        self._gauges = gauges
        self._group: Any = None
        self._attempt = Attempt([], clock)
        self._watchdog = Watchdog(config.hang, clock)
        self._stragglers = Stragglers([])
        self._profiling = Profiling(0)
        self._first: HostFailure | None = None
        self._cause = Cause.INFRASTRUCTURE
        self._verdict = Verdict(again=True)
        self._stage = Stage.RESERVING
        self._since = clock()
        self._looked_for_stop = float("-inf")
        self._looked_for_profile = float("-inf")
        self._limit: str | None = None
        """Which setting ends the run."""

    def interrupt(self, *_: object) -> None:
        """A signal handler: stop the run the way `tpu train stop` does."""
        self._interrupted.set()

    def run(self) -> None:
        """Returns when the run has its final state in status.json."""
        self._go(BEGIN, None)
        while self._stage not in ENDS:
            if (asked := self._stop_asked()) is not None:
                self._happen(asked)
            elif self._time_up():
                self._happen(Happening.TIME_UP)
            elif self._stage in (Stage.STARTING, Stage.RUNNING) and self._watchdog.hung() is not None:
                self._happen(Happening.HUNG)
            else:
                _WATCHES[self._stage](self)
            self._record.tick()
            if self._gauges is not None:
                self._gauges.show(self._record.status, now=self._stage in ENDS)

    def _happen(self, happening: Happening) -> None:
        step = TRANSITIONS[self._stage, happening]
        if step != Step(self._stage):
            self._go(step, happening)

    def _go(self, step: Step, why: Happening | None) -> None:
        """Enter a stage and carry out what belongs to that. Of the effects, the last may make something happen at once."""
        left, self._stage, self._since = self._stage, step.stage, self._clock()
        if step.stage not in ENDS:
            self._show()
        follows = None
        for effect in step.effects:
            follows = _EFFECTS[effect](self)
        if step.stage in ENDS:  # only now: who reads the final state finds everything given back
            self._end(left, why)
        if follows is not None:
            self._happen(follows)

    # What is watched, by stage.

    def _watch_slices(self) -> None:
        if self._gang.reserved(self._group, timeout=1):
            self._happen(Happening.RESERVED)
            return
        phase = Phase.BOOTING if self._gang.boots() else Phase.CAPACITY
        if phase != self._record.status.phase:
            self._record.enter(self._record.status.state, phase)

    def _watch_hosts(self) -> None:
        if self._gang.find_hosts(self._group):
            self._happen(Happening.JOINED)
        else:
            self._wait(0.25)  # Ray tells nobody when a node joins

    def _watch_processes(self) -> None:
        if self._stage is Stage.RUNNING:
            self._pass_profile_on()
        soon = self._stage is Stage.GATHERING
        for index, event in self._gang.poll(timeout=0.1 if soon else POLL_S):
            self._take(index, event)

    def _watch_clock(self) -> None:
        self._wait(min(POLL_S, max(0.0, self._since + self._verdict.delay - self._clock())))

    def _take(self, index: int, event: Mapping[str, Any]) -> None:
        if event["event"] == "notice":
            self._record.event("notice", host=self._attempt.hosts[index], kind=event["kind"], deadline=event["deadline"])
        elif event["event"] in ANSWERS:
            about = {key: value for key, value in event.items() if key not in ("event", "time")}
            self._record.event(event["event"], host=self._attempt.hosts[index], **about)
            if self._profiling.done(index, event):
                self._record.clear_profile_request()
        elif event["event"] not in ("error", "exit", "lost"):
            self._record.apply(event, index)
            self._watchdog.hear(index, event)
            if self._gauges is not None:
                self._gauges.hear(index, event)
            if (slow := self._stragglers.hear(index, event, self._clock())) is not None:
                self._record.event("straggler", **vars(slow))
                logger.warning("host %s is slow: the others wait %.3f s of each step for it", slow.host, slow.extra_s)
        happening = self._attempt.take(index, event)
        if happening is Happening.STEP:
            self._record.event("first_step", step=self._attempt.step, attempt=self._record.status.attempt)
        if happening is not None:
            self._happen(happening)

    def _pass_profile_on(self) -> None:
        if self._clock() - self._looked_for_profile < self._directory.poll_s:
            return
        self._looked_for_profile = self._clock()
        if (request := self._profiling.to_send(self._record.profile_requested())) is not None:
            self._gang.profile(request)

    def _stop_asked(self) -> Happening | None:
        """What the user wants, now or by a limit, and is not under way yet. The run directory is asked as often as it bears."""
        asked = StopRequest.SAVE if self._interrupted.is_set() else None
        if self._clock() - self._looked_for_stop >= self._directory.poll_s:
            self._looked_for_stop = self._clock()
            asked = self._record.stop_requested() or asked
        if asked is StopRequest.NOW:
            return Happening.STOP_NOW
        if asked is None:
            self._limit = limit_reached(self._config, *self._record.spent())
            asked = StopRequest.SAVE if self._limit is not None else None
        return Happening.STOP if asked is not None and self._stage is not Stage.STOPPING else None

    def _time_up(self) -> bool:
        """Whether the stage's own time limit has passed; most have none: capacity and training take as long as they take."""
        now, spent = self._clock(), self._clock() - self._since
        match self._stage:
            case Stage.JOINING:
                return spent > self._hosts_limit and bool(self._gang.incomplete)
            case Stage.LEAVING:
                return now > self._attempt.deadline + NOTICE_GRACE_S
            case Stage.GATHERING:
                return spent >= ECHO_WINDOW_S
            case Stage.PAUSING | Stage.MOVING:
                return spent >= self._verdict.delay
            case Stage.STOPPING:
                return spent > STOP_GRACE_S
        return False

    # What is carried out.

    def _reserve(self) -> None:
        self._attempt = Attempt([], self._clock)
        self._group = self._gang.reserve()

    def _place(self) -> None:
        self._gang.place(self._record.status.attempt)
        self._record.hold_slices(sorted({host.slice_name for host in self._gang.hosts}), len(self._gang.hosts))
        self._record.event("hosts", hosts=[host.name for host in self._gang.hosts])

    def _start(self) -> Happening | None:
        self._attempt = Attempt([host.name for host in self._gang.hosts], self._clock)
        self._watchdog = Watchdog(self._config.hang, self._clock)
        self._stragglers = Stragglers(self._attempt.hosts)
        self._profiling = Profiling(len(self._attempt.hosts))
        self._record.begin_attempt()
        try:
            pids = self._gang.start(self._record.status.attempt, ANSWER_LIMIT_S)
        except GangLost as error:
            return self._lost(error)
        self._record.event("processes", attempt=self._record.status.attempt, pids=pids)
        return None

    def _ask_to_end(self) -> None:
        self._gang.terminate()  # also those whose hosts stay: they would wait for the others

    def _dump(self) -> None:
        """Where every process stands goes into the run directory, and who looks as if it kept the others waiting is blamed."""
        attempt, words = self._record.status.attempt, self._watchdog.hung() or "hung"
        found = self._gang.stacks(STACKS_LIMIT_S)
        for index, stacks in enumerate(found):
            if stacks is not None:
                self._record.write_stacks(index, stacks)
        self._attempt.blame(self._attempt.hang(found, f"{words}; stacks are in logs/{attempt}/host-*.stacks"))

    def _judge(self) -> Happening:
        """Find the cause, write the failure down, charge a budget."""
        if not self._attempt.hosts:
            self._blame_missing_hosts()
        first, cause = self._find_cause()
        status = self._record.status
        self._record.event("failure", host=first.host, cause=cause.value, error=first.describe, attempt=status.attempt, step=status.step)
        logger.warning("attempt %d failed at step %d on %s (%s): %s", status.attempt, status.step, first.host, cause, first.describe)
        self._first, self._cause = first, cause
        self._verdict = self._budgets.judge(first, cause, self._attempt.step)
        if not self._verdict.again:
            return Happening.OVER
        return Happening.AGAIN_ELSEWHERE if self._attempt.needs_new_hosts else Happening.AGAIN_HERE

    def _replace(self) -> None:
        for name in self._attempt.blamed_slices:
            self._gang.replace([name], self._attempt.blame_of(name))

    def _kill(self) -> Happening | None:
        """End what is left of the gang; its peers would hang in a collective."""
        try:
            self._gang.kill(ANSWER_LIMIT_S)
        except GangLost as error:
            return self._lost(error)
        return None

    def _release(self) -> None:
        self._gang.release()
        self._record.hold_slices([], self._record.status.hosts if self._stage in ENDS else 0)

    # Helpers of these.

    def _show(self) -> None:
        """Tell the run directory of the stage."""
        status = self._record.status
        fields: dict[str, Any] = {}
        state = SHOWN.get(self._stage, status.state)
        if state is RunState.RECOVERING and self._first is not None:
            counts = {**vars(status.recoveries), self._cause.value: getattr(status.recoveries, self._cause.value) + 1}
            failure = failure_of(self._first.host, self._first.describe)
            fields = {
                "attempt": status.attempt + 1,
                "recoveries": Recoveries(**counts),
                "first_failure": failure,
                "spent": self._budgets.spent,
            }
            self._first = None  # it is counted
        self._record.enter(state, PHASES.get(self._stage, status.phase), **fields)
        if fields and self._verdict.delay > 0:
            self._record.event("backoff", seconds=self._verdict.delay, attempt=status.attempt + 1)

    def _end(self, left: Stage, why: Happening | None) -> None:
        """Write the run's final state."""
        fields: dict[str, Any] = {"reason": None, "ended_at": self._clock()}
        if self._stage is Stage.FAILED and self._first is not None:
            fields |= {"reason": self._verdict.reason, "first_failure": failure_of(self._first.host, self._first.describe)}
        elif self._stage is Stage.STOPPED:
            fields["reason"] = self._why_stopped(left, why)
        self._record.enter(SHOWN[self._stage], "", **fields)

    def _why_stopped(self, left: Stage, why: Happening | None) -> str:
        if why is Happening.STOP_NOW:
            return "stopped at once, as somebody asked"
        reason = "stopped on request" if self._limit is None else f"stopped: {self._limit}"
        if left is Stage.STOPPING and why is Happening.TIME_UP:
            return f"{reason}; its processes did not checkpoint within {STOP_GRACE_S:.0f} s and were killed"
        if left is Stage.STOPPING and why in (Happening.FAILURE, Happening.GONE):
            first, _ = self._attempt.finding()
            return f"{reason}; on the way {first.host} failed: {first.describe}"
        return f"{reason}, while {_STOPPED_WHILE[left]}" if left in _STOPPED_WHILE else reason

    def _find_cause(self) -> tuple[HostFailure, Cause]:
        first, cause = self._attempt.finding()
        slices = sorted({host.slice_name for host in self._gang.hosts} | set(self._attempt.blamed_slices))
        # A process whose peer went away ends on its own, often before Ray tells of the host that was lost.
        unexplained = is_echo(first) or self._attempt.hosts_may_be_lost
        if cause is Cause.INFRASTRUCTURE and unexplained and (words := self._taken(slices)):
            return replace(first, error=f"{words}; {first.error}", preempted=True), Cause.PREEMPTED
        return first, cause

    def _blame_missing_hosts(self) -> None:
        for name in self._gang.incomplete:
            words = f"not all hosts of {name} joined within {self._hosts_limit:.0f} s"
            self._attempt.blame(HostFailure(name, self._clock(), None, words, sick=words))

    def _lost(self, error: GangLost) -> Happening:
        self._attempt.blame(HostFailure("gang", self._clock(), None, str(error)))
        return Happening.FAILURE


_WATCHES: Mapping[Stage, Callable[[Supervisor], None]] = {
    Stage.RESERVING: Supervisor._watch_slices,
    Stage.JOINING: Supervisor._watch_hosts,
    Stage.STARTING: Supervisor._watch_processes,
    Stage.RUNNING: Supervisor._watch_processes,
    Stage.LEAVING: Supervisor._watch_processes,
    Stage.GATHERING: Supervisor._watch_processes,
    Stage.STOPPING: Supervisor._watch_processes,
    Stage.PAUSING: Supervisor._watch_clock,
    Stage.MOVING: Supervisor._watch_clock,
}
_EFFECTS: Mapping[Effect, Callable[[Supervisor], Happening | None]] = {
    Effect.RESERVE: Supervisor._reserve,
    Effect.PLACE: Supervisor._place,
    Effect.START: Supervisor._start,
    Effect.ASK_TO_END: Supervisor._ask_to_end,
    Effect.DUMP: Supervisor._dump,
    Effect.JUDGE: Supervisor._judge,
    Effect.REPLACE: Supervisor._replace,
    Effect.KILL: Supervisor._kill,
    Effect.RELEASE: Supervisor._release,
}


def states_of(cluster: str, kind: str) -> list[Life]:
    """Of the cluster's slices of this accelerator type, as the last listing showed them."""
    return [life for found, life in read_standing(cluster).values() if found == kind]


def wait_for_silence(record: RunRecord, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
    """Return when no training process of a supervisor before this one lives any more: the run is never executed twice at a time."""
    if clock() < record.status.quiet_at:
        record.enter(record.status.state, "waiting for the end of what was left")
    while clock() < record.status.quiet_at:
        record.tick()
        sleep(0.2)


def watch_over(supervise: Callable[[], None], record: RunRecord, release: Callable[[], None], clear_up: Callable[[], None]) -> int:
    """Carry a run to its end, and clear up behind it; the supervisor's exit code.

    Whatever goes wrong in `supervise` ends it as FAILED, but for two things that say nothing of the run: somebody else has it now, or its
    directory cannot be reached. Then it stays unfinished: the cluster's keeper starts a next supervisor as soon as it can read the run.
    """
    try:
        supervise()
    except Superseded as error:
        logger.warning("ending without a word more: %s", error)
        release()
    except (Unwritten, CloudError) as error:
        logger.error("the run is left unfinished, to be gone on with: %s", error)
        release()
        return EXIT_UNFINISHED
    except BaseException as error:
        # The outermost loop: whatever went wrong here must be found in the run directory, not in the log of a job that may be gone.
        logger.exception("the supervisor failed")
        record.enter(RunState.FAILED, "", reason=f"the supervisor failed: {type(error).__name__}: {error}", ended_at=time.time())
        clear_up()
        raise
    clear_up()
    return 0


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
    desk = Desk(RunDirectory(arguments.run_dir, patience=None), status, background=True)
    record = RunRecord(directory, replace(status, job=arguments.job), time.time, config.slices.usd_per_hour, desk)
    if status.state is RunState.QUEUED:
        record.enter(RunState.STARTING, Phase.STARTING)
    else:
        record.enter(RunState.RECOVERING, Phase.RECOVERING)
    ray.init(address=os.environ["RAY_ADDRESS"], namespace=directory.run_id, log_to_driver=False, logging_level=logging.WARNING)
    gang = Gang(directory, config.slices, slice_resource(config.slices), arguments.secrets)
    supervisor = Supervisor(
        directory,
        gang,
        record,
        config.run,
        taken=functools.partial(taken_slice, config.cluster.name),
        hosts_limit=provisioning_limit(config.slices.hosts),
        gauges=RunGauges(
            Gauges(directory.run_id, config.cluster.name),
            config.slices.usd_per_hour,
            functools.partial(states_of, config.cluster.name, config.slices.accelerator.name),
        ),
    )
    signal.signal(signal.SIGTERM, supervisor.interrupt)

    def supervise() -> None:
        wait_for_silence(record, time.time, time.sleep)
        supervisor.run()

    code = watch_over(supervise, record, gang.release, lambda: settle(directory, RunIndex(arguments.index)))
    print(json.dumps({"run": directory.run_id, "state": record.status.state}))
    sys.exit(code)


if __name__ == "__main__":
    main()
