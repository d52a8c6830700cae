"""The held-out loss: of all that is kept out of training, and of each part of a mixture."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from launcher.data.batches import EvalBatches, share_out
from launcher.data.cache import PackedData

Sums = tuple[float, float]
"""(sum of losses in nats, number of learned tokens)."""


class HeldOut(NamedTuple):
    """Mean nats per learned token."""

    loss: float
    parts: dict[str, float]
    """Of each part of a mixture that has something held out, by its name; empty where there is one source."""


def measure(data: PackedData, batch_size: int, limit: int, sums_of: Callable[[EvalBatches], Sums]) -> HeldOut:
    """`limit`: batches, shared out among the parts. A part of which not all is read counts in the whole as if it were."""
    batches = share_out(data.held_out, batch_size, limit)
    found = [sums_of(of_part) if of_part.count else (0.0, 0.0) for of_part in batches]
    names = [part.setting.rpartition(".")[2] for part in data.train]
    parts = {name: total / count for name, (total, count) in zip(names, found, strict=True) if count}
    return HeldOut(_together(batches, found), parts if len(names) > 1 else {})


def _together(batches: Sequence[EvalBatches], found: Sequence[Sums]) -> float:
    total = count = 0.0
    for of_part, sums in zip(batches, found, strict=True):
        unread = of_part.data.rows / max(1, min(of_part.data.rows, of_part.count * of_part.batch_size))
        total, count = total + sums[0] * unread, count + sums[1] * unread
    return total / max(count, 1.0)
