"""Whether a run is started again after a failure, and after how long. Knows no clock: it counts."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.config import BudgetConfig
from launcher.gang.evidence import Cause, HostFailure, says_of_the_program

_WORDS = {
    Cause.PREEMPTED: "preempted",
    Cause.INFRASTRUCTURE: "infrastructure error",
    Cause.OOM: "out of memory",
    Cause.APPLICATION: "application error",
}
_CHANGING = re.compile(r"0x[0-9a-f]+|\d+")
"""What differs between two reports of one error: addresses, ports, process ids, times."""


@dataclass(frozen=True)
class Verdict:
    again: bool
    reason: str = ""
    """Why not."""
    delay: float = 0.0
    """Seconds until the next attempt."""


class Budgets:
    """The failures of a run since a person last asked for it: a run that somebody takes up again has its whole budgets."""

    def __init__(self, config: BudgetConfig, spent: Mapping[str, int] | None = None) -> None:
        """`spent`: by supervisors before this one."""
        self._config = config
        self._used = Counter({Cause(cause): count for cause, count in (spent or {}).items()})
        self._seen: set[tuple[int | None, str]] = set()
        self._highest = 0
        self._in_vain = 0
        """Failures since the run last came further than ever before."""

    @property
    def spent(self) -> dict[str, int]:
        return {cause.value: count for cause, count in self._used.items()}

    def judge(self, first: HostFailure, cause: Cause, step: int | None) -> Verdict:
        """Charge a failure. `step`: the last of the failed attempt, None when it did none."""
        if (step or 0) > self._highest:
            self._highest, self._in_vain = step or 0, 0
        elif cause is not Cause.PREEMPTED:  # that run waits for its new slice anyway
            self._in_vain += 1
        limit: int | None = getattr(self._config, cause.value)
        if limit == 0:
            return Verdict(False, _WORDS[cause])
        if self._is_repeated(first, step):
            where = "before its first step" if step is None else f"at step {step}"
            return Verdict(False, f"crash loop: the same error twice {where}")
        if limit is not None and self._used[cause] >= limit:
            return Verdict(False, f"run.budget.{cause.value}={limit} is used up")
        self._used[cause] += 1
        return Verdict(True, delay=self._delay())

    def _is_repeated(self, first: HostFailure, step: int | None) -> bool:
        if not says_of_the_program(first):
            return False
        key = (step, _CHANGING.sub("#", first.describe))
        known = key in self._seen
        self._seen.add(key)
        return known

    def _delay(self) -> float:
        """At once when the run had come further than ever; else twice as long each time."""
        if self._in_vain == 0:
            return 0.0
        return min(self._config.backoff_seconds * 2.0 ** (self._in_vain - 1), self._config.backoff_limit_seconds)
