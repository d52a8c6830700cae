"""The supervisor's decisions, with Ray replaced at its seam: a gang that says what the test scripted."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from cluster.config import ClusterConfig
from launcher.config import BudgetConfig, LaunchConfig, RunConfig
from launcher.data.config import DataConfig
from launcher.gang.attempt import EXIT_STOPPED
from launcher.gang.child import Event
from launcher.gang.gang import Gang, GangLost
from launcher.gang.placement import Host
from launcher.gang.record import RunRecord
from launcher.gang.supervisor import Supervisor
from launcher.models.config import ModelConfig
from launcher.profiles import ProfileRequest
from launcher.runs import Recoveries, RunDirectory, RunState, RunStatus, StopRequest

Script = list[tuple[int, Event]]


class Clock:
    """Virtual; an alarm goes off when somebody looks at the clock after its time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.alarms: list[tuple[float, Callable[[], None]]] = []

    def __call__(self) -> float:
        while self.alarms and self.alarms[0][0] <= self.now:
            self.alarms.pop(0)[1]()
        return self.now


class ScriptedGang:
    """Two hosts; attempt k says what `scripts[k]` holds, one event a poll, while the clock goes on."""

    def __init__(self, clock: Clock, *scripts: Script, unreachable_at: int | None = None) -> None:
        self._clock = clock
        self._scripts = list(scripts)
        self._unreachable_at = unreachable_at
        self._script: Script = []
        self.hosts: list[Host] = []
        self.incomplete: list[str] = []
        self.calls: list[str] = []

    def reserve(self) -> str:
        self.calls.append("reserve")
        return "group"

    def reserved(self, group: str, timeout: int) -> bool:
        self._clock.now += timeout
        return True

    def boots(self) -> bool:
        return False

    def find_hosts(self, group: str) -> bool:
        self.hosts = [Host("s0", worker, f"10.0.0.{worker}", f"n{worker}") for worker in range(2)]
        return True

    def replace(self, slices: list[str], reason: str) -> None:
        self.calls.append(f"replace {','.join(slices)}")

    def place(self, attempt: int) -> None:
        self.next_attempt = attempt
        self.calls.append("place")

    def start(self, attempt: int, timeout: float) -> list[int]:
        if self.calls[-1] == "place":
            assert attempt == self.next_attempt, "what was begun ahead is what is started"
        self.calls.append(f"start {attempt}")
        if attempt == self._unreachable_at:
            raise GangLost("the actor is dead")
        self._script = self._scripts.pop(0)
        return [11, 12]

    def poll(self, timeout: float) -> Script:
        self._clock.now += timeout
        return [self._script.pop(0)] if self._script else []

    def stacks(self, timeout: float) -> list[str | None]:
        self.calls.append("stacks")
        return ["process 1 is sleeping, 3 threads", "process 2 is stopped, 3 threads"]

    def profile(self, request: ProfileRequest) -> None:
        self.calls.append(f"profile {request.steps}")

    def terminate(self) -> None:
        self.calls.append("terminate")
        self._script = [(0, exited(EXIT_STOPPED)), (1, exited(EXIT_STOPPED))]

    def kill(self, timeout: float) -> None:
        self.calls.append("kill")

    def release(self) -> None:
        self.calls.append("release")
        self.hosts = []


def exited(code: int, last_line: str = "") -> Event:
    return {"event": "exit", "code": code, "time": 0.0, "last_line": last_line}


def step(number: int) -> Event:
    return {"event": "step", "step": number, "total_steps": 10, "loss": 1.0, "tokens_per_second": 1.0, "mfu": None}


def failed(error: str) -> Event:
    return {"event": "error", "error": error}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "a-run")
    cluster = ClusterConfig(name="c", accelerator_type="v4-16", cloud="emulated")
    directory.create(LaunchConfig(cluster, ModelConfig("gemma3-nano"), DataConfig("python_stdlib")))
    directory.write_status(RunStatus("a-run", "c", RunState.QUEUED, started_at=1000.0))
    return directory


def supervise(
    run: RunDirectory,
    gang: ScriptedGang,
    clock: Clock,
    *,
    infrastructure: int = 3,
    application: int = 0,
    max_hours: float | None = None,
    max_usd: float | None = None,
    interrupt_after: float | None = None,
    taken: str = "",
) -> RunStatus:
    """`interrupt_after`: seconds until SIGTERM reaches the supervisor."""
    status = run.status()
    assert status is not None
    began, accounted = clock.now, sum(status.phases.values())
    record = RunRecord(run, status, clock, 3600.0)
    record.enter(RunState.STARTING, "connecting to Ray")
    budget = BudgetConfig(infrastructure=infrastructure, application=application)
    config = RunConfig(budget=budget, max_hours=max_hours, max_usd=max_usd)

    def wait(seconds: float) -> None:
        clock.now += seconds

    supervisor = Supervisor(run, cast(Gang, gang), record, config, clock, taken=lambda _: taken, hosts_limit=600.0, wait=wait)
    if interrupt_after is not None:
        clock.alarms.append((clock.now + interrupt_after, supervisor.interrupt))
    supervisor.run()
    status = run.status()
    assert status is not None
    assert gang.hosts == [], "slices are given back"
    assert sum(status.phases.values()) - accounted == pytest.approx(clock.now - began, abs=0.01), "every second is in a phase"
    return status


def test_a_gang_whose_processes_all_end_well_succeeds(run: RunDirectory) -> None:
    clock = Clock()
    gang = ScriptedGang(clock, [(0, step(1)), (0, step(10)), (0, exited(0)), (1, exited(0))])
    status = supervise(run, gang, clock)
    assert (status.state, status.step, status.recoveries.total, status.hosts) == (RunState.SUCCEEDED, 10, 0, 2)
    assert gang.calls == ["reserve", "place", "start 0", "release"]


def test_a_killed_process_costs_one_recovery_and_the_same_hosts_go_on(run: RunDirectory) -> None:
    clock = Clock()
    gang = ScriptedGang(
        clock,
        [(0, step(4)), (1, exited(-signal.SIGKILL)), (0, exited(1, "XlaRuntimeError: Gloo: Connection closed by peer"))],
        [(0, step(5)), (0, exited(0)), (1, exited(0))],
    )
    status = supervise(run, gang, clock)
    assert (status.state, status.attempt, status.recoveries.infrastructure) == (RunState.SUCCEEDED, 1, 1)
    assert status.first_failure is not None
    assert status.first_failure.host == "s0/1"
    assert "SIGKILL" in status.first_failure.error
    assert gang.calls == ["reserve", "place", "start 0", "kill", "start 1", "release"]


def test_a_lost_host_means_new_hosts(run: RunDirectory) -> None:
    clock = Clock()
    lost = {"event": "lost", "error": "the host's runner is gone"}
    gang = ScriptedGang(clock, [(0, step(4)), (1, lost)], [(0, exited(0)), (1, exited(0))])
    status = supervise(run, gang, clock)
    assert (status.state, status.recoveries.infrastructure) == (RunState.SUCCEEDED, 1)
    assert gang.calls == ["reserve", "place", "start 0", "release", "reserve", "place", "start 1", "release"]


def test_hosts_lost_before_the_start_are_replaced_too(run: RunDirectory) -> None:
    clock = Clock()
    gang = ScriptedGang(clock, [(0, exited(0)), (1, exited(0))], unreachable_at=0)
    assert supervise(run, gang, clock).state is RunState.SUCCEEDED


def test_an_error_of_the_program_ends_the_run_with_its_host_and_words(run: RunDirectory) -> None:
    clock = Clock()
    gang = ScriptedGang(clock, [(0, step(3)), (1, failed("ValueError: bad")), (1, exited(1, "...")), (0, exited(1, "Gloo: heartbeat"))])
    status = supervise(run, gang, clock)
    assert (status.state, status.reason) == (RunState.FAILED, "application error")
    assert status.first_failure is not None
    assert (status.first_failure.host, status.first_failure.error) == ("s0/1", "ValueError: bad")
    assert status.ended_at is not None


def test_infrastructure_failures_end_the_run_once_the_budget_is_used_up(run: RunDirectory) -> None:
    clock = Clock()
    scripts: list[Script] = [[(0, step(number)), (0, exited(-signal.SIGKILL))] for number in range(1, 5)]
    status = supervise(run, ScriptedGang(clock, *scripts), clock, infrastructure=2)
    assert (status.state, status.recoveries.infrastructure) == (RunState.FAILED, 2)
    assert status.reason == "run.budget.infrastructure=2 is used up"


def test_what_supervisors_before_have_spent_stays_spent(run: RunDirectory) -> None:
    clock = Clock()
    run.write_status(RunStatus("a-run", "c", RunState.QUEUED, started_at=1000.0, spent={"infrastructure": 1}))
    scripts: list[Script] = [[(0, step(number)), (0, exited(-signal.SIGKILL))] for number in range(1, 4)]
    status = supervise(run, ScriptedGang(clock, *scripts), clock, infrastructure=2)
    assert (status.state, status.reason) == (RunState.FAILED, "run.budget.infrastructure=2 is used up")
    assert status.spent == {"infrastructure": 2}


def test_a_run_that_is_taken_up_again_has_its_whole_budget(run: RunDirectory) -> None:
    clock = Clock()
    used_up = RunStatus("a-run", "c", RunState.QUEUED, started_at=1000.0, recoveries=Recoveries(infrastructure=7))
    run.write_status(used_up)
    scripts: list[Script] = [[(0, step(1)), (0, exited(-signal.SIGKILL))], [(0, exited(0)), (1, exited(0))]]
    status = supervise(run, ScriptedGang(clock, *scripts), clock, infrastructure=1)
    assert (status.state, status.recoveries.infrastructure) == (RunState.SUCCEEDED, 8)


def test_the_same_error_at_the_same_step_twice_is_a_crash_loop(run: RunDirectory) -> None:
    clock = Clock()
    scripts: list[Script] = [[(0, step(3)), (0, failed("UNAVAILABLE: no device")), (0, exited(1))] for _ in range(3)]
    status = supervise(run, ScriptedGang(clock, *scripts), clock, infrastructure=10)
    assert (status.state, status.reason) == (RunState.FAILED, "crash loop: the same error twice at step 3")


def test_a_stop_lets_the_gang_checkpoint_and_end(run: RunDirectory) -> None:
    clock = Clock()
    clock.alarms.append((1005.0, run.request_stop))
    gang = ScriptedGang(clock, [(0, step(3))])
    status = supervise(run, gang, clock)
    assert (status.state, status.reason) == (RunState.STOPPED, "stopped on request")
    assert gang.calls == ["reserve", "place", "start 0", "terminate", "release"]


def test_a_stop_that_comes_first_waits_for_no_slices(run: RunDirectory) -> None:
    clock = Clock()
    run.request_stop()
    gang = ScriptedGang(clock)
    status = supervise(run, gang, clock)
    assert (status.state, status.reason) == (RunState.STOPPED, "stopped on request, while it waited for its slices")
    assert gang.calls == ["reserve", "release"]


def test_a_stop_without_a_checkpoint_asks_nobody(run: RunDirectory) -> None:
    clock = Clock()
    clock.alarms.append((1005.0, lambda: run.request_stop(StopRequest.NOW)))
    gang = ScriptedGang(clock, [(0, step(3))])
    status = supervise(run, gang, clock)
    assert (status.state, status.reason) == (RunState.STOPPED, "stopped at once, as somebody asked")
    assert gang.calls == ["reserve", "place", "start 0", "release"]


def test_a_stop_without_a_checkpoint_overtakes_one_with(run: RunDirectory) -> None:
    clock = Clock()

    class Deaf(ScriptedGang):
        def terminate(self) -> None:
            """Its processes are in the middle of something."""

    clock.alarms += [(1005.0, run.request_stop), (1010.0, lambda: run.request_stop(StopRequest.NOW))]
    assert supervise(run, Deaf(clock, [(0, step(3))]), clock).reason == "stopped at once, as somebody asked"
    assert clock.now < 1012


def test_a_run_checkpoints_and_ends_when_its_hours_are_used_up(run: RunDirectory) -> None:
    clock = Clock()
    began = clock.now
    gang = ScriptedGang(clock, [(0, step(3))])
    status = supervise(run, gang, clock, max_hours=0.01)
    assert (status.state, status.reason) == (RunState.STOPPED, "stopped: run.max_hours=0.01 is reached")
    assert "terminate" in gang.calls
    assert 36 <= clock.now - began < 40


def test_hours_of_earlier_supervisors_count_and_idle_ones_do_not(run: RunDirectory) -> None:
    clock = Clock()
    phases = {"training": 30.0, "idle": 1e6}
    run.write_status(RunStatus("a-run", "c", RunState.QUEUED, started_at=0.0, updated_at=clock.now, phases=phases))
    supervise(run, ScriptedGang(clock, [(0, step(3))]), clock, max_hours=0.01)
    assert 6 <= clock.now - 1000 < 10


def test_a_run_checkpoints_and_ends_when_its_money_is_used_up(run: RunDirectory) -> None:
    clock = Clock()
    status = supervise(run, ScriptedGang(clock, [(0, step(3))]), clock, max_usd=20.0)
    assert (status.state, status.reason) == (RunState.STOPPED, "stopped: run.max_usd=20 is reached (estimate by list price)")
    assert status.cost_usd == pytest.approx(20, abs=1), "a dollar a second"


def test_a_limit_ends_a_wait_for_capacity(run: RunDirectory) -> None:
    clock = Clock()

    class Nothing(ScriptedGang):
        def reserved(self, group: str, timeout: int) -> bool:
            clock.now += timeout
            return False

    status = supervise(run, Nothing(clock), clock, max_hours=1.0)
    assert status.reason == "stopped: run.max_hours=1 is reached, while it waited for its slices"
    assert status.cost_usd == 0.0


def test_a_stop_ends_a_backoff_at_once(run: RunDirectory) -> None:
    clock = Clock()
    scripts: list[Script] = [[(0, exited(-signal.SIGKILL))] for _ in range(9)]
    gang = ScriptedGang(clock, *scripts)
    clock.alarms.append((1200.0, run.request_stop))
    status = supervise(run, gang, clock, infrastructure=9)
    assert (status.state, status.reason) == (RunState.STOPPED, "stopped on request, while it recovered")
    assert 1200 <= clock.now < 1201, "in the middle of 128 s"


def test_attempts_that_come_no_further_wait_longer_each_time(run: RunDirectory) -> None:
    clock = Clock()
    scripts: list[Script] = [[(0, step(at)), (0, exited(-signal.SIGKILL))] for at in (5, 5, 3, 9, 9)]
    supervise(run, ScriptedGang(clock, *scripts, [(0, exited(0)), (1, exited(0))]), clock, infrastructure=9)
    assert [event["seconds"] for event in run.events() if event["event"] == "backoff"] == [2.0, 4.0, 2.0]


def test_sigterm_to_the_supervisor_stops_the_run(run: RunDirectory) -> None:
    clock = Clock()
    gang = ScriptedGang(clock, [(0, step(3))])
    assert supervise(run, gang, clock, interrupt_after=5.0).state is RunState.STOPPED
    assert "terminate" in gang.calls


def test_processes_that_do_not_heed_a_stop_are_killed(run: RunDirectory) -> None:
    clock = Clock()

    class Deaf(ScriptedGang):
        def terminate(self) -> None:
            self.calls.append("terminate")

    clock.alarms.append((1005.0, run.request_stop))
    status = supervise(run, Deaf(clock, [(0, step(3))]), clock)
    assert status.state is RunState.STOPPED
    assert status.reason is not None
    assert "were killed" in status.reason


def test_every_change_of_state_is_an_event(run: RunDirectory) -> None:
    clock = Clock()
    script: Script = [(0, step(1)), (1, exited(-signal.SIGKILL))]
    supervise(run, ScriptedGang(clock, script, [(0, step(2)), (0, exited(0)), (1, exited(0))]), clock)
    states: list[Any] = [event["state"] for event in run.events() if event["event"] == "state"]
    assert states == ["STARTING", "RUNNING", "RECOVERING", "RUNNING", "SUCCEEDED"]


def test_the_first_step_of_each_attempt_is_told_once(run: RunDirectory) -> None:
    clock = Clock()
    scripts: list[Script] = [
        [(0, step(1)), (0, step(2)), (1, step(7)), (0, exited(-signal.SIGKILL))],
        [(0, step(2)), (0, exited(0)), (1, exited(0))],
    ]
    supervise(run, ScriptedGang(clock, *scripts), clock)
    assert [(event["attempt"], event["step"]) for event in run.events() if event["event"] == "first_step"] == [(0, 1), (1, 2)]


def noticed(clock: Clock, kind: str = "preempted", within: float = 30.0) -> Event:
    return {"event": "notice", "kind": kind, "time": clock.now, "deadline": clock.now + within}


@pytest.mark.parametrize("kind", ["preempted", "maintenance"])
def test_a_gang_that_checkpoints_on_notice_goes_on_on_new_hosts_and_costs_no_budget(run: RunDirectory, kind: str) -> None:
    clock = Clock()
    gang = ScriptedGang(clock, [(0, step(4)), (0, noticed(clock, kind))], [(0, step(5)), (0, exited(0)), (1, exited(0))])
    status = supervise(run, gang, clock, infrastructure=0)
    assert (status.state, status.recoveries) == (RunState.SUCCEEDED, Recoveries(preempted=1))
    assert gang.calls == ["reserve", "place", "start 0", "terminate", "release", "reserve", "place", "start 1", "release"]
    assert status.first_failure is not None
    assert status.first_failure.error == f"the cloud announced: {kind}"
    assert [(event["host"], event["kind"]) for event in run.events() if event["event"] == "notice"] == [("s0/0", kind)]


def test_hosts_that_go_before_they_have_checkpointed_are_preempted_too(run: RunDirectory) -> None:
    clock = Clock()

    class Slow(ScriptedGang):
        def terminate(self) -> None:
            self._script = [(0, exited(1, "Gloo: Connection closed by peer")), (1, {"event": "lost", "error": "the runner is gone"})]

    gang = Slow(clock, [(0, step(4)), (1, noticed(clock))], [(0, exited(0)), (1, exited(0))])
    assert supervise(run, gang, clock, infrastructure=0).recoveries == Recoveries(preempted=1)


def test_a_gang_that_says_nothing_after_its_notice_is_given_up_at_the_deadline(run: RunDirectory) -> None:
    clock = Clock()

    class Deaf(ScriptedGang):
        def terminate(self) -> None:
            """Its processes hang."""

    gang = Deaf(clock, [(0, noticed(clock, within=30))], [(0, exited(0)), (1, exited(0))])
    began = clock.now
    assert supervise(run, gang, clock, infrastructure=0).recoveries == Recoveries(preempted=1)
    assert 35 <= clock.now - began <= 40


def test_a_run_that_finishes_after_the_notice_has_succeeded(run: RunDirectory) -> None:
    clock = Clock()

    class Done(ScriptedGang):
        def terminate(self) -> None:
            self._script = [(0, exited(0)), (1, exited(0))]

    status = supervise(run, Done(clock, [(0, step(10)), (0, noticed(clock))]), clock)
    assert (status.state, status.recoveries.total) == (RunState.SUCCEEDED, 0)


def test_a_bug_on_a_preempted_slice_is_still_a_bug(run: RunDirectory) -> None:
    clock = Clock()

    class Broken(ScriptedGang):
        def terminate(self) -> None:
            self._script = [(1, failed("ValueError: bad")), (1, exited(1, "..."))]

    status = supervise(run, Broken(clock, [(0, noticed(clock))]), clock)
    assert (status.state, status.reason) == (RunState.FAILED, "application error")


@pytest.mark.parametrize("seen", [{"event": "lost", "error": "the runner is gone"}, exited(-signal.SIGABRT), exited(1, "Gloo: it is gone")])
@pytest.mark.parametrize(("taken", "cause"), [("slice s0 became PREEMPTED", "preempted"), ("", "infrastructure")])
def test_a_host_lost_without_a_word_is_preempted_when_the_cloud_took_its_slice_whoever_noticed(
    run: RunDirectory, taken: str, cause: str, seen: Event
) -> None:
    clock = Clock()
    gang = ScriptedGang(clock, [(0, step(4)), (1, seen)], [(0, exited(0)), (1, exited(0))])
    status = supervise(run, gang, clock, taken=taken)
    assert status.recoveries == Recoveries(**{cause: 1})
    assert status.first_failure is not None
    assert taken in status.first_failure.error


KILLED = exited(-signal.SIGKILL, "[Gloo] Connection closed by peer")


@pytest.mark.parametrize(("killed", "cause"), [([1], "infrastructure"), ([0, 1], "preempted")])
def test_the_cloud_is_asked_about_kills_when_no_process_is_left_and_not_about_one(run: RunDirectory, killed: list[int], cause: str) -> None:
    clock = Clock()
    gang = ScriptedGang(clock, [(0, step(4)), *((index, KILLED) for index in killed)], [(0, exited(0)), (1, exited(0))])
    assert supervise(run, gang, clock, taken="slice s0 became PREEMPTED").recoveries == Recoveries(**{cause: 1})


def test_ray_knows_of_a_preemption_too(run: RunDirectory) -> None:
    clock = Clock()
    lost = {"event": "lost", "error": "the runner is gone", "preempted": True}
    gang = ScriptedGang(clock, [(1, lost)], [(0, exited(0)), (1, exited(0))])
    assert supervise(run, gang, clock, infrastructure=0).recoveries == Recoveries(preempted=1)


def test_a_sick_machine_costs_its_slice_and_the_budget(run: RunDirectory) -> None:
    clock = Clock()
    sick = {**exited(1, "Traceback"), "sick": "RuntimeError: TPU initialization failed"}
    gang = ScriptedGang(clock, [(0, exited(1, "Gloo: heartbeat")), (1, sick)], [(0, exited(0)), (1, exited(0))])
    assert supervise(run, gang, clock).recoveries == Recoveries(infrastructure=1)
    assert gang.calls[3:5] == ["replace s0", "release"]
    endless: list[Script] = [[(1, sick)] for _ in range(5)]
    run.write_status(RunStatus("a-run", "c", RunState.QUEUED, attempt=1, started_at=1000.0))
    assert supervise(run, ScriptedGang(clock, *endless), clock, infrastructure=2).state is RunState.FAILED, "a bad program burns no slices"


def test_processes_that_somebody_else_asked_to_end_are_started_again(run: RunDirectory) -> None:
    clock = Clock()
    stopped: Script = [(0, exited(EXIT_STOPPED)), (1, exited(EXIT_STOPPED))]
    status = supervise(run, ScriptedGang(clock, stopped, [(0, exited(0)), (1, exited(0))]), clock)
    assert (status.state, status.recoveries) == (RunState.SUCCEEDED, Recoveries(infrastructure=1))


def test_a_gang_that_hangs_is_looked_at_and_started_again(run: RunDirectory) -> None:
    clock = Clock()
    training: Script = [(0, {"event": "phase", "phase": "training"}), (0, step(4)), (1, step(4))]
    gang = ScriptedGang(clock, training, [(0, step(5)), (0, exited(0)), (1, exited(0))])
    began = clock.now
    status = supervise(run, gang, clock)
    assert (status.state, status.recoveries) == (RunState.SUCCEEDED, Recoveries(infrastructure=1))
    assert gang.calls == ["reserve", "place", "start 0", "stacks", "kill", "start 1", "release"]
    assert status.first_failure is not None
    assert status.first_failure.host == "s0/1"
    assert "hung: no progress for 300 s after step 4; stacks are in logs/0/host-*.stacks" in status.first_failure.error
    assert (run.path / "logs" / "0" / "host-1.stacks").read_text().startswith("process 2 is stopped")
    assert 300 < clock.now - began < 310


def test_a_slow_host_is_told_by_name(run: RunDirectory) -> None:
    clock = Clock()
    steps: Script = [(index, {**step(number), "stall_s": 0.6 * number * index}) for number in range(1, 9) for index in (0, 1)]
    supervise(run, ScriptedGang(clock, [*steps, (0, exited(0)), (1, exited(0))]), clock)
    (slow,) = [event for event in run.events() if event["event"] == "straggler"]
    assert (slow["host"], slow["extra_s"], slow["step_s"]) == ("s0/1", pytest.approx(0.6), pytest.approx(1.0))


def test_an_oom_kill_of_the_kernel_is_no_infrastructure(run: RunDirectory) -> None:
    clock = Clock()
    killed = {**exited(-signal.SIGKILL), "oom": "the kernel's out-of-memory killer ended a process"}
    status = supervise(run, ScriptedGang(clock, [(0, step(3)), (1, killed)]), clock)
    assert (status.state, status.reason) == (RunState.FAILED, "out of memory")
    assert status.first_failure is not None
    assert status.first_failure.host == "s0/1"


def test_an_application_budget_starts_a_failed_program_again_until_it_fails_in_the_same_way(run: RunDirectory) -> None:
    clock = Clock()
    scripts: list[Script] = [[(0, step(at)), (0, failed("ValueError: flaky")), (0, exited(1)), (1, exited(1, "Gloo"))] for at in (3, 5, 5)]
    status = supervise(run, ScriptedGang(clock, *scripts), clock, application=5)
    assert (status.state, status.recoveries) == (RunState.FAILED, Recoveries(application=2))
    assert status.reason == "crash loop: the same error twice at step 5"


def test_a_failure_while_a_run_stops_is_told(run: RunDirectory) -> None:
    clock = Clock()

    class Full(ScriptedGang):
        def terminate(self) -> None:
            self._script = [(0, failed("CheckpointError: No space left on device")), (0, exited(1))]

    clock.alarms.append((1005.0, run.request_stop))
    status = supervise(run, Full(clock, [(0, step(3))]), clock)
    assert (status.state, status.reason) == (
        RunState.STOPPED,
        "stopped on request; on the way s0/0 failed: CheckpointError: No space left on device",
    )


def test_a_run_that_finishes_after_it_was_asked_to_stop_has_succeeded(run: RunDirectory) -> None:
    clock = Clock()

    class Done(ScriptedGang):
        def terminate(self) -> None:
            self._script = [(0, exited(0)), (1, exited(0))]

    clock.alarms.append((1005.0, run.request_stop))
    assert supervise(run, Done(clock, [(0, step(10))]), clock).state is RunState.SUCCEEDED


def test_hosts_that_do_not_answer_to_be_cleared_are_given_back(run: RunDirectory) -> None:
    clock = Clock()

    class Mute(ScriptedGang):
        def kill(self, timeout: float) -> None:
            self.calls.append("kill")
            raise GangLost("no answer")

    gang = Mute(clock, [(0, step(4)), (0, exited(-signal.SIGKILL))], [(0, exited(0)), (1, exited(0))])
    assert supervise(run, gang, clock).recoveries == Recoveries(infrastructure=1), "one failure, one recovery"
    assert gang.calls == ["reserve", "place", "start 0", "kill", "release", "reserve", "place", "start 1", "release"]


def test_a_slice_whose_hosts_do_not_all_join_is_replaced(run: RunDirectory) -> None:
    clock = Clock()

    class Half(ScriptedGang):
        tries = 0

        def find_hosts(self, group: str) -> bool:
            clock.now += 100
            Half.tries += 1
            self.incomplete = ["s0"] if Half.tries < 9 else []
            return super().find_hosts(group) if Half.tries >= 9 else False

    gang = Half(clock, [(0, exited(0)), (1, exited(0))])
    assert supervise(run, gang, clock).recoveries == Recoveries(infrastructure=1)
    assert gang.calls[:3] == ["reserve", "replace s0", "release"]


def test_a_program_that_tells_no_step_runs_all_the_same(run: RunDirectory) -> None:
    clock = Clock()
    began: Event = {"event": "phase", "phase": "script"}
    supervise(
        run,
        ScriptedGang(clock, [(0, began), (0, exited(-signal.SIGKILL))], [(0, began), (0, step(5)), (0, exited(0)), (1, exited(0))]),
        clock,
    )
    events = list(run.events())
    states: list[Any] = [event["state"] for event in events if event["event"] == "state"]
    assert states == ["STARTING", "RUNNING", "RECOVERING", "RUNNING", "SUCCEEDED"]
    assert [(event["attempt"], event["step"]) for event in events if event["event"] == "first_step"] == [(1, 5)]


def test_a_profile_is_passed_on_while_the_gang_trains_and_taken_back_when_all_have_answered(run: RunDirectory) -> None:
    clock = Clock()
    request = ProfileRequest("2026_01_02", 3)
    assert run.request_profile(request)
    answer = {"event": "profile", "id": request.id, "first": 2, "last": 4, "bytes": 7}
    first = [(0, step(1)), (0, step(2)), (0, answer), (1, exited(-signal.SIGKILL))]
    second = [(0, step(3)), (0, step(4)), (0, answer), (1, answer), (0, exited(0)), (1, exited(0))]
    gang = ScriptedGang(clock, first, second)
    assert supervise(run, gang, clock).state is RunState.SUCCEEDED
    assert [call for call in gang.calls if call.startswith(("profile", "start"))] == ["start 0", "profile 3", "start 1", "profile 3"]
    told = [(event["host"], event["first"]) for event in run.events() if event["event"] == "profile"]
    assert told == [("s0/0", 2), ("s0/0", 2), ("s0/1", 2)]
    assert run.profile_requested() is None
