"""The embedding table at both ends of a decoder: rows for tokens, and the loss of the next ones."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from launcher.models.chunks import CHUNK_ELEMENTS, chunk_length
from launcher.models.loss import cross_entropy
from launcher.models.words import SplitWords

PIECE = 2048
"""Tokens that are looked up at a time. The gradient adds as many rows into the table, which the TPU compiler sorts first: for 65,536 rows
that alone takes it minutes, whatever the table's size."""


class Vocabulary(Protocol):
    """What a decoder and its loss do with the table [vocab, d_model]."""

    def lookup(self, table: jax.Array, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """[B, T, d_model] of `dtype`, from tokens int32 [B, T]."""
        ...

    def cross_entropy(
        self, hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array, soft_cap: float | None
    ) -> tuple[jax.Array, jax.Array]:
        """`launcher.models.loss.cross_entropy` of the whole batch, in chunks that every device has room for."""
        ...


class WholeVocabulary:
    """On one device, or whole on each of several."""

    def lookup(self, table: jax.Array, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        return table[tokens].astype(dtype)

    def cross_entropy(
        self, hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array, soft_cap: float | None
    ) -> tuple[jax.Array, jax.Array]:
        rows, length, _ = hidden.shape
        return cross_entropy(hidden, table, targets, weights, chunk_length(rows, length, table.shape[0]), soft_cap)


WHOLE = WholeVocabulary()


@dataclass(frozen=True)
class SplitVocabulary:
    """With the words split over the devices. Neither the table, nor its gradient, nor the logits of all words are ever whole on one of
    them: what travels are tokens and their hidden states.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    """Mesh axes that split the batch."""
    length: str
    """The one that splits sequences."""
    words: tuple[str, str]
    """Those that split the table, the first of them the batch as well."""
    piece: int = PIECE
    chunk_elements: int = CHUNK_ELEMENTS

    def lookup(self, table: jax.Array, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        length = self.length if tokens.shape[1] % self.mesh.shape[self.length] == 0 else None
        find = self._sharded(
            partial(_find, self._share(table), self.piece, jnp.dtype(dtype)),
            inputs=(_spec(self.words, None), _spec(self.batch, length)),
            outputs=_spec(self.batch, length, None),
        )
        rows: jax.Array = find(table, tokens)
        return rows

    def cross_entropy(
        self, hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array, soft_cap: float | None
    ) -> tuple[jax.Array, jax.Array]:
        share, replicas = self._share(table), tuple(axis for axis in (*self.batch, self.length) if axis not in self.words)

        def part(hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
            rows, length = hidden.shape[0] * self.mesh.shape[share.shared], hidden.shape[1]
            chunk = chunk_length(rows, length, share.count, self.chunk_elements)
            total, count = cross_entropy(hidden, table, targets, weights, chunk, soft_cap, share)
            return _sum(total, replicas), _sum(count, (*replicas, share.shared))

        tokens = _spec(self.batch, self.length)
        inputs = (_spec(self.batch, self.length, None), _spec(self.words, None), tokens, tokens)
        sums: tuple[jax.Array, jax.Array] = self._sharded(part, inputs, (_spec(), _spec()))(hidden, table, targets, weights)
        return sums

    def _share(self, table: jax.Array) -> SplitWords:
        shared, other = self.words
        return SplitWords(shared, other, table.shape[0] // (self.mesh.shape[shared] * self.mesh.shape[other]))

    def _sharded(self, function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
        sharded: Callable[..., Any] = jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
        return sharded


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _find(words: SplitWords, piece: int, dtype: jnp.dtype[Any], table: jax.Array, tokens: jax.Array) -> jax.Array:
    """One device's part: the rows of its own tokens."""

    def find(tokens: jax.Array) -> jax.Array:
        places, mine = _places(words, tokens)
        return words.sum_own(jnp.where(mine[..., None], table[jnp.where(mine, places, 0)].astype(dtype), 0))

    found = jnp.moveaxis(jax.lax.map(find, _pieces(words, piece, tokens)), 0, 1)
    return found.reshape(*tokens.shape, table.shape[1])


def _find_forward(words: SplitWords, piece: int, dtype: jnp.dtype[Any], table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _find(words, piece, dtype, table, tokens), tokens


def _find_backward(words: SplitWords, piece: int, _dtype: jnp.dtype[Any], tokens: jax.Array, found: jax.Array) -> tuple[jax.Array, None]:
    """The transposed of `_find`, which JAX would add up in a table of its own for every piece."""

    def add(gradient: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        tokens, rows = part
        places, mine = _places(words, tokens)
        rows = words.gather(_sum(rows, (words.other,))).astype(gradient.dtype)
        return gradient.at[jnp.where(mine, places, words.count)].add(rows, mode="drop"), None

    nothing = jnp.zeros((words.count, found.shape[-1]), jnp.float32)
    gradient, _ = jax.lax.scan(add, nothing, (_pieces(words, piece, tokens), _pieces(words, piece, found)))
    return gradient, None


_find.defvjp(_find_forward, _find_backward)


def _places(words: SplitWords, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the tokens of all sequences stand in this device's part of the table, and whether they do."""
    places = words.gather(tokens) - words.first
    return places, (places >= 0) & (places < words.count)


def _pieces(words: SplitWords, piece: int, x: jax.Array) -> jax.Array:
    """[B, T, ...] -> [pieces, B, T / pieces, ...]."""
    rows, length = x.shape[:2]
    limit = max(1, piece // (rows * jax.lax.axis_size(words.shared)))
    size = next(size for size in range(min(limit, length), 0, -1) if length % size == 0)
    return jnp.moveaxis(x.reshape(rows, length // size, size, *x.shape[2:]), 1, 0)


def _sum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    summed: jax.Array = jax.lax.psum(x, axes)  # type: ignore[no-untyped-call]  # JAX's
    return summed


def _spec(*axes: Any) -> PartitionSpec:
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]  # JAX's
