"""Has a gang stopped making progress? One process that hangs makes all others wait in a collective, and none of them ever ends.

Knows no Ray and no processes: the clock comes in, and what the processes say.
"""

import statistics
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from launcher.config import HangConfig

REMEMBERED = 64
"""Steps whose time makes the median."""
_PROGRESS = frozenset({"phase", "step", "checkpoint", "evaluation", "samples", "restored", "checkpoint_set_aside", "finished"})


class Watchdog:
    """Of one attempt."""

    def __init__(self, config: HangConfig, clock: Callable[[], float]) -> None:
        """`clock`: seconds."""
        self._config, self._clock = config, clock
        self._since = clock()
        self._phase = "connecting"
        self._is_script = False
        self._step: tuple[int, float] | None = None
        """The last step that process 0 told of in this phase, and when."""
        self._times: deque[float] = deque(maxlen=REMEMBERED)

    def hear(self, index: int, event: Mapping[str, Any]) -> None:
        """What the process of host `index` said; whatever tells of work is progress of them all."""
        kind = event["event"]
        if kind not in _PROGRESS:
            return
        now = self._since = self._clock()
        if index == 0 and kind == "phase":
            self._phase, self._step = event["phase"], None
            self._is_script = self._is_script or self._phase == "script"
        elif index == 0 and kind == "step":
            if self._step is not None and event["step"] > self._step[0]:
                self._times.append((now - self._step[1]) / (event["step"] - self._step[0]))
            self._step = event["step"], now

    @property
    def limit(self) -> float | None:
        """Seconds without progress after which the gang counts as hung; None when that cannot be told.

        Between steps `steps` times the median one, and at least `floor`. Elsewhere at least `quiet`, since nothing is told before a
        compilation or a checkpoint is over. A script need not say anything, and what it does between its steps is its own.
        """
        if self._is_script and not self._times:
            return None
        by_steps = self._config.steps * statistics.median(self._times) if self._times else 0.0
        between_steps = self._step is not None and not self._is_script
        return max(by_steps, self._config.floor_seconds if between_steps else self._config.quiet_seconds)

    def hung(self) -> str | None:
        """What to say of a gang that hangs; None for one that does not."""
        limit, spent = self.limit, self._clock() - self._since
        if limit is None or spent <= limit:
            return None
        where = f"after step {self._step[0]}" if self._step is not None else f"in phase {self._phase}"
        return f"hung: no progress for {spent:.0f} s {where}"
