"""Batch k as a pure function of (seed, k): a resume needs no state of its own and is exact on any number of hosts."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from launcher.data.cache import Part
from launcher.data.packed import PackedSet

CYCLE = 10_000
"""In so many rows every part of a mixture has exactly its share, up to the rounding to one row."""


@dataclass(frozen=True)
class Batch:
    """Rows of a batch, [rows, seq_len] each, ready for the model."""

    tokens: NDArray[np.int32]
    targets: NDArray[np.int32]
    positions: NDArray[np.int32]
    """Counted from the beginning of the segment."""
    segment_ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    """1 where the target counts in the loss."""

    FIELDS = ("tokens", "targets", "positions", "segment_ids", "weights")


class TrainBatches:
    """Rows of one or several parts, each shuffled, epoch after epoch; an epoch may end inside a batch, and a batch may be larger than
    the data. Which part a row is of follows the weights.
    """

    def __init__(self, parts: Sequence[Part], batch_size: int, seed: int) -> None:
        self.parts, self.batch_size, self.seed = tuple(parts), batch_size, seed
        self.seq_len = parts[0].rows.seq_len
        self._shares = shares_of([part.weight for part in parts])

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of the batch of optimizer step `step` (counted from 0); reads nothing else."""
        first = step * self.batch_size
        found = [self._row(first + i) for i in range(start, stop)]
        return _assemble([self.parts[part].rows for part, _ in found], [row for _, row in found])

    def ids(self, step: int) -> list[tuple[int, int]]:
        """(part, row of its packed set) of all that makes up the batch of optimizer step `step` (counted from 0)."""
        return [self._row(step * self.batch_size + i) for i in range(self.batch_size)]

    def places(self, step: int) -> list[str]:
        """Where the documents of that batch begin, each once: file, and line or row."""
        return list(dict.fromkeys(place for part, row in self.ids(step) for place in self.parts[part].places(row)))

    def _row(self, index: int) -> tuple[int, int]:
        part, count = self._part(index)
        epoch, place = divmod(count, self.parts[part].rows.rows)
        seed = (self.seed, epoch, part) if part else (self.seed, epoch)
        return part, int(_permutation(seed, self.parts[part].rows.rows)[place])

    def _part(self, index: int) -> tuple[int, int]:
        """Which part row `index` of the whole training is of, and how many of its rows came before."""
        if len(self.parts) == 1:
            return 0, index
        cycle, place = divmod(index, CYCLE)
        order, before = _cycle(self.seed, cycle, self._shares)
        part = int(order[place])
        return part, cycle * self._shares[part] + int(before[place])


class EvalBatches:
    """Rows in their stored order, each at most once; the last batch is filled up with rows that do not count."""

    def __init__(self, data: PackedSet, batch_size: int, limit: int) -> None:
        self.data, self.batch_size, self.seq_len = data, batch_size, data.seq_len
        self.count = min(limit, -(-data.rows // batch_size))

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of batch `step`, 0 <= step < count."""
        indices = step * self.batch_size + np.arange(start, stop)
        batch = _assemble([self.data] * len(indices), np.minimum(indices, self.data.rows - 1).tolist())
        real = (indices < self.data.rows).astype(np.float32)[:, None]
        return Batch(batch.tokens, batch.targets, batch.positions, batch.segment_ids, batch.weights * real)


def share_out(parts: Sequence[PackedSet], batch_size: int, limit: int) -> list[EvalBatches]:
    """Of each part its batches: all, or about `limit` altogether, by the parts' rows, and one at least of each that has any."""
    needed = [-(-part.rows // batch_size) for part in parts]
    rows = sum(part.rows for part in parts)
    given = needed if sum(needed) <= limit else [max(1, limit * part.rows // rows) for part in parts]
    return [EvalBatches(part, batch_size, batches) for part, batches in zip(parts, given, strict=True)]


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Rows of each part in a cycle: in proportion, at least one, CYCLE in all (largest remainders)."""
    exact = np.array(weights, np.float64) / sum(weights) * CYCLE
    counts = np.maximum(1, np.floor(exact)).astype(np.int64)
    for i in np.argsort(counts - exact, kind="stable")[: max(0, CYCLE - int(counts.sum()))]:
        counts[i] += 1
    counts[np.argmax(counts)] -= counts.sum() - CYCLE  # what parts of less than one row got too much
    return tuple(counts.tolist())


@functools.lru_cache(maxsize=2)  # as below
def _cycle(seed: int, cycle: int, shares: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(the part of each row of a cycle, how many rows of that part are before it in the cycle)."""
    order = np.repeat(np.arange(len(shares)), shares)
    np.random.default_rng([seed, cycle, len(shares)]).shuffle(order)
    before = np.zeros(CYCLE, np.int64)
    for part in range(len(shares)):
        mine = order == part
        before[mine] = np.arange(int(mine.sum()))
    return order, before


@functools.lru_cache(maxsize=16)  # a batch touches at most the epoch it is in and, at its end, the next, of each part
def _permutation(seed: tuple[int, ...], rows: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(rows)


def _assemble(sets: Sequence[PackedSet], rows: Sequence[int]) -> Batch:
    def stacked(name: str) -> NDArray[np.int32]:
        return np.stack([getattr(data, name)[row] for data, row in zip(sets, rows, strict=True)]).astype(np.int32)

    tokens, segments = stacked("tokens"), stacked("segments")
    same = segments[:, 1:] == segments[:, :-1]
    counted = same & (segments[:, 1:] > 0) & (stacked("learned")[:, 1:] > 0)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        positions=_positions(segments[:, :-1]),
        segment_ids=segments[:, :-1],
        weights=counted.astype(np.float32),
    )


def _positions(segments: NDArray[np.int32]) -> NDArray[np.int32]:
    places = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    begins = np.ones(segments.shape, np.bool_)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    return (places - starts).astype(np.int32)
