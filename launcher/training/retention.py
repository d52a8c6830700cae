"""Which checkpoints to keep. Knows no files."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """The last `last`, and for good the first at or after every multiple of `every` steps (None: no such)."""

    last: int
    every: int | None = None

    def superfluous(self, steps: Iterable[int]) -> list[int]:
        """Those of the existing `steps` that may go, oldest first. The newest never goes."""
        ordered = sorted(steps)
        kept = {*ordered[-self.last :], *self._for_good(ordered)}
        return [step for step in ordered if step not in kept]

    def _for_good(self, ordered: list[int]) -> Iterable[int]:
        if self.every is None:
            return
        reached = 0
        for step in ordered:
            if step // self.every > reached:
                reached = step // self.every
                yield step
