"""Where the time of a run went: every second belongs to exactly one phase, and has its price.

The account goes from the run's first submission to its end, over all attempts and all supervisors; while nobody writes it, the run is
recovering, or idle when it had ended. Its sum is the wall time. Goodput is the share that trained something new; the phases that are
not training are the badput (google/ml-goodput-measurement has the same kinds).

Training is told step by step. Steps up to the highest one that was ever reached are done again after a rollback: lost work. Of the time
between two steps, the training process itself tells how much it waited for its input.
"""

from collections.abc import Mapping
from enum import StrEnum


class Phase(StrEnum):
    """The keys of status.json's phases and costs, and what a live display shows."""

    CAPACITY = "waiting for capacity"
    BOOTING = "booting hosts"
    STARTING = "starting processes"
    """From the submission to the supervisor's first word, and from the start of the training processes until all have joined."""
    DATA = "preparing data"
    COMPILING = "compiling"
    RESTORING = "restoring"
    INITIALIZING = "initializing the model"
    EVALUATING = "evaluating"
    SCRIPT = "running the script"
    """What a program of the user's does before, between and after the steps that it tells of; all, when it tells of none."""
    TRAINING = "training"
    AGAIN = "training again"
    """Steps that an earlier attempt had done, and no checkpoint held."""
    INPUT = "input stall"
    """The devices waited for the next batch."""
    SAVING = "saving"
    """Training stood still for a checkpoint. What is written in the background costs nothing."""
    EXPORTING = "exporting"
    RECOVERING = "recovering"
    """From a failure until processes are started again or new slices are asked for, pauses included."""
    IDLE = "idle"
    """The run had ended, or was suspended, before somebody took it up again."""


class Account:
    """Times are seconds since the epoch, and must not go back; one that does counts as no time.

    `seconds` and `dollars` are what an earlier account of the run had come to at `since`, `highest` the highest step it had seen.
    """

    def __init__(
        self,
        since: float,
        phase: Phase,
        *,
        seconds: Mapping[str, float] | None = None,
        dollars: Mapping[str, float] | None = None,
        highest: int = 0,
    ) -> None:
        self._seconds = dict(seconds or {})
        self._dollars = dict(dollars or {})
        self._since, self._phase = since, phase
        self._rate = 0.0
        self._step = 0
        """Of this attempt, the last one that is accounted for."""
        self._waited = 0.0
        """For input, of this attempt's training so far."""
        self.highest = highest

    @property
    def phase(self) -> Phase:
        return self._phase

    def enter(self, phase: Phase, now: float) -> None:
        """Another phase begins. Of training that is left without having told its last step, what is on its way counts as it would have."""
        self._pass(now)
        self._phase = phase

    def begin_at(self, step: int) -> None:
        """This attempt has `step` steps behind it: it restored their result, or starts."""
        self._step, self._waited = step, 0.0

    def step(self, step: int, waited: float, now: float) -> None:
        """This attempt has done `step`; `waited`: seconds for input, since the attempt began to train."""
        span = max(0.0, now - self._since)
        stalled = min(span, max(0.0, waited - self._waited))
        self._add(Phase.INPUT, stalled)
        done = step - self._step
        again = min(max(0, self.highest - self._step), done) / done if done > 0 else float(step <= self.highest)
        self._add(Phase.AGAIN, (span - stalled) * again)
        self._add(Phase.TRAINING, (span - stalled) * (1 - again))
        self._since = max(now, self._since)
        self._step, self._waited = step, max(waited, self._waited)
        self.highest = max(self.highest, step)

    def charge(self, usd_per_second: float, now: float) -> None:
        """From now on a second costs so much."""
        self._pass(now)
        self._rate = usd_per_second

    def seconds(self, now: float) -> dict[str, float]:
        """Seconds by phase up to `now`, the longest first."""
        return self._sorted(self._seconds, max(0.0, now - self._since))

    def dollars(self, now: float) -> dict[str, float]:
        """US dollars by phase up to `now`."""
        return self._sorted(self._dollars, max(0.0, now - self._since) * self._rate)

    def _sorted(self, values: Mapping[str, float], running: float) -> dict[str, float]:
        now = {**values, self._current: values.get(self._current, 0.0) + running} if running else dict(values)
        return dict(sorted(now.items(), key=lambda item: -item[1]))

    @property
    def _current(self) -> Phase:
        """Training whose next step was done before is training again."""
        return Phase.AGAIN if self._phase is Phase.TRAINING and self._step < self.highest else self._phase

    def _pass(self, now: float) -> None:
        self._add(self._current, now - self._since)
        self._since = max(now, self._since)

    def _add(self, phase: Phase, span: float) -> None:
        if span > 0:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + span
            self._dollars[phase] = self._dollars.get(phase, 0.0) + span * self._rate


def goodput(seconds: Mapping[str, float]) -> float | None:
    """The share of all time that trained something new, 0 to 1; None when no time has passed, or a script tells of no steps."""
    total = sum(seconds.values())
    if Phase.SCRIPT in seconds and Phase.TRAINING not in seconds:
        return None
    return seconds.get(Phase.TRAINING, 0.0) / total if total > 0 else None
