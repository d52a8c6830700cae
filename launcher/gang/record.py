"""The supervisor's account of its run: what status.json says, and where every second went."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from launcher.claims import Superseded
from launcher.gang.desk import Desk
from launcher.goodput import Account, Phase, goodput
from launcher.profiles import ProfileRequest
from launcher.runs import AT_REST, FINAL, FirstFailure, RunDirectory, RunState, RunStatus, StopRequest

# What the training process calls its phases.
CHILD_PHASES: Mapping[str, Phase] = {
    "connecting": Phase.STARTING,
    "data": Phase.DATA,
    "compiling": Phase.COMPILING,
    "restoring": Phase.RESTORING,
    "initializing": Phase.INITIALIZING,
    "evaluating": Phase.EVALUATING,
    "script": Phase.SCRIPT,
    "training": Phase.TRAINING,
    "saving": Phase.SAVING,
    "exporting": Phase.EXPORTING,
}
WRITE_INTERVAL_S = 0.5


class RunRecord:
    """Keeps a run's status and writes it: at once when the state or phase changes, else at most every `WRITE_INTERVAL_S`.

    Every method that writes raises Superseded, and writes nothing, once somebody else has claimed a later attempt of the run; and
    Unwritten when the run directory refuses. Who enters an attempt or an end returns when that is written, or raises Unwritten.
    """

    def __init__(
        self,
        directory: RunDirectory,
        status: RunStatus,
        clock: Callable[[], float],
        usd_per_hour: float | None,
        desk: Desk | None = None,
    ) -> None:
        """`status`: what the run's last supervisor, or who submitted it, has left. Its account goes on, without a gap. `desk`: by default
        one that writes at once.
        """
        self._directory = directory
        self._desk = desk or Desk(directory, status)
        self._clock = clock
        self._usd_per_hour = usd_per_hour
        self._account = Account(
            status.updated_at or clock(), status.unwatched, seconds=status.phases, dollars=status.costs, highest=status.highest_step
        )
        self._written = 0.0
        self._stalls: dict[int, float] = {}
        """Seconds by host, of this attempt."""
        self.status = status

    def enter(self, state: RunState, phase: str, **fields: Any) -> None:
        """Change state and phase; both are written at once, a new state also as an event. A new attempt is claimed first. The account ends
        with a final state.
        """
        self._claim(fields.get("attempt", self.status.attempt))
        if state is RunState.STOPPED and self._desk.look_for_stop() is StopRequest.SUSPEND:
            state, fields = RunState.SUSPENDED, {**fields, "ended_at": None}
        if phase in _ACCOUNTED:
            self._pass_to(Phase(phase), self._clock())
        changed = state is not self.status.state
        self._set(state=state, phase=phase, **fields)
        if changed:
            self.event("state", state=state.value, attempt=self.status.attempt, **({"reason": r} if (r := fields.get("reason")) else {}))
        self.write()
        if state in AT_REST:
            self._desk.flush()

    def stop_requested(self) -> StopRequest | None:
        """What the run directory said when it was last asked."""
        return self._desk.stop_requested()

    def profile_requested(self) -> ProfileRequest | None:
        """The same of a profile."""
        return self._desk.profile_requested()

    def clear_profile_request(self) -> None:
        """All hosts have answered."""
        self._desk.clear_profile_request()

    def event(self, name: str, **fields: Any) -> None:
        self._desk.append(self.status.attempt, {"time": self._clock(), "event": name, **fields})

    def write_stacks(self, host: int, stacks: str) -> None:
        """Where a process of this attempt hung."""
        self._desk.write_stacks(self.status.attempt, host, stacks)

    def begin_attempt(self) -> None:
        """New training processes: nothing is done and nothing restored."""
        self._stalls = {}
        self._account.begin_at(0)

    def hold_slices(self, names: list[str], hosts: int) -> None:
        """From now on the run pays for these slices; an empty list ends that."""
        self._pay(bool(names))
        self._set(slices=names, hosts=hosts)
        self.write()

    def apply(self, event: Mapping[str, Any], index: int = 0) -> None:
        """Take in what a process of the gang said: of process 0 all, of the others how long the devices waited for them."""
        if event["event"] == "step":
            self._stalls[index] = event.get("stall_s", 0.0)
        if index != 0:
            return
        handler = _HANDLERS.get(event["event"])
        if handler is not None:
            handler(self, event)
        if event["event"] not in ("step", "phase"):
            self.event(event["event"], **{key: value for key, value in event.items() if key not in ("event", "time")})

    def tick(self) -> None:
        """Write the status when the last writing is long enough ago."""
        self._desk.check()
        if self._clock() - self._written >= max(WRITE_INTERVAL_S, self._directory.poll_s):
            self.write()

    def spent(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds and US dollars by phase, up to now."""
        now = self._clock()
        return self._account.seconds(now), self._account.dollars(now)

    def write(self) -> None:
        now = self._clock()
        until = self.status.ended_at if self.status.state in FINAL and self.status.ended_at is not None else now
        phases, costs = self._account.seconds(until), self._account.dollars(until)
        self._set(
            updated_at=until,
            phases={phase: round(seconds, 3) for phase, seconds in phases.items()},
            goodput=goodput(phases),
            costs={phase: round(dollars, 6) for phase, dollars in costs.items() if dollars},
            cost_usd=None if self._usd_per_hour is None else round(sum(costs.values()), 4),
            highest_step=self._account.highest,
        )
        self._desk.show(self.status)
        self._written = now

    def _claim(self, attempt: int) -> None:
        if attempt > self.status.attempt and not self._desk.claim(attempt, self.status.job or self.status.run_id):
            raise Superseded(f"attempt {attempt} is somebody else's")

    def _pass_to(self, phase: Phase, when: float) -> None:
        if phase is not self._account.phase:
            self._account.enter(phase, when)
            if phase is Phase.BOOTING:  # a slice is billed from when it is READY
                self._pay(True)
            if phase is Phase.CAPACITY:
                self._pay(False)

    def _pay(self, paying: bool) -> None:
        self._account.charge((self._usd_per_hour or 0.0) / 3600 if paying else 0.0, self._clock())

    def _set(self, **fields: Any) -> None:
        self.status = dataclasses.replace(self.status, **fields)

    def _heard_at(self, event: Mapping[str, Any]) -> float:
        """When it happened: the host's clock may be ahead of ours, but not of what we hear."""
        now = self._clock()
        return min(now, float(event.get("time", now)))

    def _on_phase(self, event: Mapping[str, Any]) -> None:
        phase = CHILD_PHASES.get(event["phase"], event["phase"])
        if phase in _ACCOUNTED:
            self._pass_to(Phase(phase), self._heard_at(event))
        self._set(phase=phase)
        if phase not in _BRIEF:
            self.write()

    def _on_step(self, event: Mapping[str, Any]) -> None:
        self._account.step(event["step"], max(self._stalls.values()), self._heard_at(event))  # all wait for the slowest
        new = {key: event[key] for key in ("loss", "tokens_per_second", "mfu") if event.get(key) is not None}
        self._set(step=event["step"], total_steps=event["total_steps"], **new)

    def _on_restored(self, event: Mapping[str, Any]) -> None:
        self._account.begin_at(event["step"])

    def _on_checkpoint(self, event: Mapping[str, Any]) -> None:
        # Of steps that carry no metrics not every one is told, and the last before a stop may be one.
        self._set(checkpoint=event["step"], step=max(self.status.step, event["step"]))

    def _on_evaluation(self, event: Mapping[str, Any]) -> None:
        if event["when"] == "before":
            self._set(held_out_before=event["loss"])
        else:
            self._set(held_out_after=event["loss"], held_out_parts=event.get("parts", {}))

    def _on_finished(self, event: Mapping[str, Any]) -> None:
        self._set(step=event["step"], **({"loss": event["loss"]} if event.get("loss") is not None else {}))


_ACCOUNTED = frozenset(phase.value for phase in Phase)
_BRIEF = (Phase.TRAINING, Phase.SAVING, Phase.SCRIPT)
"""The next tick writes them: training and saving alternate, and with its script's first word a run is RUNNING, which belongs to it."""
_HANDLERS: Mapping[str, Callable[[RunRecord, Mapping[str, Any]], None]] = {
    "phase": RunRecord._on_phase,
    "step": RunRecord._on_step,
    "restored": RunRecord._on_restored,
    "checkpoint": RunRecord._on_checkpoint,
    "evaluation": RunRecord._on_evaluation,
    "finished": RunRecord._on_finished,
}


def failure_of(host: str, error: str) -> FirstFailure:
    return FirstFailure(host=host, error=" ".join(error.split())[:500])
