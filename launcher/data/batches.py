"""Batch k as a pure function of (seed, k): a resume needs no state of its own and is exact on any number of hosts."""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from launcher.data.cache import PackedSet


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
    """Shuffled rows, epoch after epoch; an epoch may end inside a batch, and a batch may be larger than the data."""

    def __init__(self, data: PackedSet, batch_size: int, seed: int) -> None:
        self.data, self.batch_size, self.seed = data, batch_size, seed

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of the batch of optimizer step `step` (counted from 0); reads nothing else."""
        first = step * self.batch_size
        return _assemble(self.data, np.array([self._row(first + i) for i in range(start, stop)], np.int64))

    def ids(self, step: int) -> list[int]:
        """The rows of the packed set that make up the batch of optimizer step `step` (counted from 0)."""
        return [self._row(step * self.batch_size + i) for i in range(self.batch_size)]

    def _row(self, index: int) -> int:
        epoch, place = divmod(index, self.data.rows)
        return int(_permutation(self.seed, epoch, self.data.rows)[place])


class EvalBatches:
    """Rows in their stored order, each at most once; the last batch is filled up with rows that do not count."""

    def __init__(self, data: PackedSet, batch_size: int, limit: int) -> None:
        self.data, self.batch_size = data, batch_size
        self.count = min(limit, -(-data.rows // batch_size))

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of batch `step`, 0 <= step < count."""
        indices = step * self.batch_size + np.arange(start, stop)
        batch = _assemble(self.data, np.minimum(indices, self.data.rows - 1))
        real = (indices < self.data.rows).astype(np.float32)[:, None]
        return Batch(batch.tokens, batch.targets, batch.positions, batch.segment_ids, batch.weights * real)


@functools.lru_cache(maxsize=2)  # a batch touches at most the epoch it is in and, at its end, the next
def _permutation(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def _assemble(data: PackedSet, indices: NDArray[np.int64]) -> Batch:
    tokens = data.tokens[indices].astype(np.int32)
    segments = data.segments[indices].astype(np.int32)
    same = segments[:, 1:] == segments[:, :-1]
    counted = same & (segments[:, 1:] > 0) & data.learned[indices][:, 1:]
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
