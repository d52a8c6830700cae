"""Rows of the embedding table, where the table is split over the devices by words."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

Lookup = Callable[[jax.Array, jax.Array, DTypeLike], jax.Array]
"""(table [vocab, d_model], tokens int32 [B, T], type) -> [B, T, d_model] of that type."""

PIECE = 2048
"""Tokens that are looked up at a time. The gradient adds as many rows into the table, which the TPU compiler sorts: it takes 11 s of CPU
for 8,192 rows, and minutes for 65,536."""


def plain_lookup(table: jax.Array, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
    return table[tokens].astype(dtype)


@dataclass(frozen=True)
class ShardedLookup:
    """Every device finds the words that it has, for all sequences of the devices that share the table, and sends each what is its own.

    Neither the table nor its gradient is ever whole on a device: what travels are the rows of the batch.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    """Mesh axes that split the batch."""
    vocab: tuple[str, str]
    """Those that split the table, first the one that splits the batch as well."""
    length: str

    def __call__(self, table: jax.Array, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        shared, other = self.vocab
        if table.shape[0] % (self.mesh.shape[shared] * self.mesh.shape[other]):
            return plain_lookup(table, tokens, dtype)
        at = _spec(self.batch, self.length)
        found: Callable[..., jax.Array] = jax.shard_map(
            partial(self._rows, dtype=dtype),
            mesh=self.mesh,
            in_specs=(_spec(self.vocab, None), at),
            out_specs=_spec(self.batch, self.length, None),
            check_vma=False,
        )
        return found(table, tokens)

    def _rows(self, table: jax.Array, tokens: jax.Array, *, dtype: DTypeLike) -> jax.Array:
        """One device's part."""
        shared, other = self.vocab
        table, words = table.astype(dtype), table.shape[0]
        first = (jax.lax.axis_index(shared) * self.mesh.shape[other] + jax.lax.axis_index(other)) * words
        rows, length = tokens.shape

        def find(piece: jax.Array) -> jax.Array:
            places = jax.lax.all_gather(piece, shared, tiled=True) - first
            mine = (places >= 0) & (places < words)
            found = jnp.where(mine[..., None], table[jnp.where(mine, places, 0)], 0)
            summed = jax.lax.psum(found, other)  # type: ignore[no-untyped-call]  # JAX's
            own: jax.Array = jax.lax.psum_scatter(summed, shared, tiled=True)  # type: ignore[no-untyped-call]  # JAX's
            return own

        size = max(1, min(length, PIECE // (rows * self.mesh.shape[shared])))
        size = next(n for n in range(size, 0, -1) if length % n == 0)
        if size == length:
            return find(tokens)
        found = jax.lax.map(find, jnp.moveaxis(tokens.reshape(rows, -1, size), 1, 0))
        return jnp.moveaxis(found, 0, 1).reshape(rows, length, -1)


def _spec(*axes: Any) -> PartitionSpec:
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]  # JAX's
