"""The supervisor's account of its run: what status.json says, and where every second went."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from launcher.runs import FirstFailure, RunDirectory, RunState, RunStatus

# What the training process calls its phases -> the name in status.json and in the summary.
CHILD_PHASES: Mapping[str, str] = {
    "connecting": "starting processes",
    "data": "preparing data",
    "compiling": "compiling",
    "restoring": "restoring",
    "initializing": "initializing the model",
    "evaluating": "evaluating",
    "script": "running the script",
    "training": "training",
    "saving": "saving",
    "exporting": "exporting",
}
WRITE_INTERVAL_S = 0.5


class RunRecord:
    """Keeps a run's status and writes it: at once when the state or phase changes, else at most every `WRITE_INTERVAL_S`."""

    def __init__(self, directory: RunDirectory, status: RunStatus, clock: Callable[[], float], usd_per_hour: float | None) -> None:
        self._directory = directory
        self._clock = clock
        self._usd_per_hour = usd_per_hour
        self._phase_since = clock()
        self._written = 0.0
        self._slices_since: float | None = None
        self._cost = status.cost_usd or 0.0
        self.status = status

    def enter(self, state: RunState, phase: str, **fields: Any) -> None:
        """Change state and phase; both are written at once, a new state also as an event."""
        self._close_phase()
        changed = state is not self.status.state
        self._set(state=state, phase=phase, **fields)
        if changed:
            self.event("state", state=state.value, attempt=self.status.attempt, **({"reason": r} if (r := fields.get("reason")) else {}))
        self.write()

    def event(self, name: str, **fields: Any) -> None:
        self._directory.append_event({"time": self._clock(), "event": name, **fields})

    def hold_slices(self, names: list[str], hosts: int) -> None:
        """From now on the run pays for these slices; an empty list ends that."""
        self._cost = self._cost_now()
        self._slices_since = self._clock() if names else None
        self._set(slices=names, hosts=hosts)
        self.write()

    def apply(self, event: Mapping[str, Any]) -> None:
        """Take in what process 0 of the gang said."""
        handler = _HANDLERS.get(event["event"])
        if handler is not None:
            handler(self, event)
        if event["event"] not in ("step", "phase"):
            self.event(event["event"], **{key: value for key, value in event.items() if key not in ("event", "time")})

    def tick(self) -> None:
        """Write the status when the last writing is long enough ago."""
        if self._clock() - self._written >= max(WRITE_INTERVAL_S, self._directory.poll_s):
            self.write()

    def write(self) -> None:
        now = self._clock()
        self._close_phase()
        total = sum(self.status.phases.values())
        silent = "training" not in self.status.phases and CHILD_PHASES["script"] in self.status.phases  # a script that reports nothing
        goodput = self.status.phases.get("training", 0.0) / total if total > 0 and not silent else None
        cost = None if self._usd_per_hour is None else round(self._cost_now(), 4)
        self._set(updated_at=now, goodput=goodput, cost_usd=cost)
        self._directory.write_status(self.status)
        self._written = now

    def _cost_now(self) -> float:
        held = 0.0 if self._slices_since is None else self._clock() - self._slices_since
        return self._cost + held / 3600 * (self._usd_per_hour or 0.0)

    def _close_phase(self) -> None:
        now = self._clock()
        if self.status.phase and self.status.state not in _IDLE:
            phases = dict(self.status.phases)
            phases[self.status.phase] = phases.get(self.status.phase, 0.0) + now - self._phase_since
            self._set(phases=phases)
        self._phase_since = now

    def _set(self, **fields: Any) -> None:
        self.status = dataclasses.replace(self.status, **fields)

    def _on_phase(self, event: Mapping[str, Any]) -> None:
        phase = CHILD_PHASES.get(event["phase"], event["phase"])
        self._close_phase()
        self._set(phase=phase)
        self.write()

    def _on_step(self, event: Mapping[str, Any]) -> None:
        new = {key: event[key] for key in ("loss", "tokens_per_second", "mfu") if event.get(key) is not None}
        self._set(step=event["step"], total_steps=event["total_steps"], **new)

    def _on_checkpoint(self, event: Mapping[str, Any]) -> None:
        self._set(checkpoint=event["step"])

    def _on_evaluation(self, event: Mapping[str, Any]) -> None:
        self._set(**{f"held_out_{event['when']}": event["loss"]})

    def _on_finished(self, event: Mapping[str, Any]) -> None:
        self._set(step=event["step"], **({"loss": event["loss"]} if event.get("loss") is not None else {}))


_IDLE = (RunState.SUCCEEDED, RunState.FAILED, RunState.STOPPED, RunState.SUSPENDED, RunState.QUEUED)
_HANDLERS: Mapping[str, Callable[[RunRecord, Mapping[str, Any]], None]] = {
    "phase": RunRecord._on_phase,
    "step": RunRecord._on_step,
    "checkpoint": RunRecord._on_checkpoint,
    "evaluation": RunRecord._on_evaluation,
    "finished": RunRecord._on_finished,
}


def failure_of(host: str, error: str) -> FirstFailure:
    return FirstFailure(host=host, error=" ".join(error.split())[:500])
