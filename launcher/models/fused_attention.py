"""Attention through the TPU's fused "splash" kernel: no logits in memory, and blocks outside the mask are not computed.

The kernel sees one device's part, so under a mesh every device computes its own batch rows, heads and stretch of queries (`shard_map`);
keys and values of the whole sequence come to every device of a sequence axis.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launcher.models.attention import Attention, Places, dense_attention

LANES = 128
"""The kernel's blocks are multiples of this many tokens."""
BLOCK = 512
"""Tokens of one block, where the sequence allows it: what fits beside its double buffers in the vector memory of every generation."""


@dataclass(frozen=True)
class FusedAttention:
    """`Attention` by the fused kernel, with `dense_attention` for sequences that are no multiple of its blocks.

    Queries, keys and positions are those of one sequence: `queries_at` and `keys_at` have to be the same, and positions have to grow by
    one within a segment, so that distances in the sequence are distances in the segment.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    """Mesh axes that split the batch."""
    heads: str
    sequence: str
    interpret: bool = False
    """Compute what the kernel computes without a TPU; for tests."""

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        queries_at: Places,
        keys_at: Places,
        is_global: jax.Array,
        window: int | None,
        scale: float,
        soft_cap: float | None,
    ) -> jax.Array:
        length, shards = query.shape[1], self.mesh.shape[self.sequence]
        if not fits_kernel(length, shards, query.shape[-1]):
            return dense_attention(
                query,
                key,
                value,
                queries_at=queries_at,
                keys_at=keys_at,
                is_global=is_global,
                window=window,
                scale=scale,
                soft_cap=soft_cap,
            )
        key, value = (self._for_head_shards(x, query.shape[2]) for x in (key, value))
        kernel = partial(self._kernel, heads=query.shape[2], length=length, soft_cap=soft_cap)
        segments = queries_at.segment_ids
        arguments = ((query * scale).astype(query.dtype), key, value, segments, keys_at.segment_ids)
        if window is None or window >= length:
            return self._sharded(kernel(window=None), *arguments)
        local, wide = kernel(window=window), kernel(window=None)
        mixed: jax.Array = jax.lax.cond(is_global, lambda: self._sharded(wide, *arguments), lambda: self._sharded(local, *arguments))
        return mixed

    def _for_head_shards(self, x: jax.Array, heads: int) -> jax.Array:
        """Keys or values with as many heads as every device's query heads need: repeated where they cannot be split evenly."""
        kv_heads, shards = x.shape[2], self.mesh.shape[self.heads]
        return x if kv_heads == 1 or kv_heads % shards == 0 else jnp.repeat(x, heads // kv_heads, axis=2)

    def _kernel(self, *, heads: int, length: int, window: int | None, soft_cap: float | None) -> splash.SplashAttentionKernel:
        shape, shards = (length, length), self.mesh.shape[self.sequence]
        one = (
            masks.CausalMask(shape, shard_count=shards)
            if window is None
            else masks.LocalMask(shape, window_size=(window - 1, 0), offset=0, shard_count=shards)
        )
        with jax.ensure_compile_time_eval():  # the mask's tables are constants, whatever is being traced
            made: splash.SplashAttentionKernel = splash.make_splash_mha(
                masks.MultiHeadMask([one] * heads),
                block_sizes=_block_sizes(length // shards, length),
                head_shards=self.mesh.shape[self.heads],
                q_seq_shards=shards,
                attn_logits_soft_cap=soft_cap,
                interpret=self.interpret,
            )
        return made

    def _sharded(
        self,
        kernel: splash.SplashAttentionKernel,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        query_segments: jax.Array,
        key_segments: jax.Array,
    ) -> jax.Array:
        heads = self.heads if self.mesh.shape[self.heads] > 1 else None
        kv_heads = heads if key.shape[2] > 1 else None
        sequence = self.sequence if self.mesh.shape[self.sequence] > 1 else None
        mask = kernel.manual_sharding_spec(NamedSharding(self.mesh, _spec(heads, sequence)))
        queries, keys = _spec(self.batch, sequence, heads, None), _spec(self.batch, None, kv_heads, None)
        inputs = (mask, queries, keys, keys, _spec(self.batch, sequence), _spec(self.batch, None))
        run: Callable[..., jax.Array] = jax.shard_map(_attend, mesh=self.mesh, in_specs=inputs, out_specs=queries, check_vma=False)
        return run(kernel, query, key, value, query_segments, key_segments)


def fits_kernel(length: int, shards: int, head_dim: int) -> bool:
    """Whether the kernel can take sequences of so many tokens split over so many devices."""
    return length % (LANES * shards) == 0 and head_dim % LANES == 0


def attention_for(mesh: Mesh, batch: tuple[str, ...], heads: str, sequence: str) -> Attention:
    """The fused kernel where the mesh is made of TPUs, XLA elsewhere."""
    if mesh.devices.flat[0].platform == "tpu":
        return FusedAttention(mesh, batch, heads, sequence)
    return dense_attention


def _attend(
    kernel: splash.SplashAttentionKernel,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
) -> jax.Array:
    """One device's part: query [B, T, heads, size], the others as in `Attention`. The kernel has heads before tokens, and no batch."""
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    segments = splash.SegmentIds(query_segments, key_segments)
    mixed = jax.vmap(kernel)(query, key, value, segments)
    assert isinstance(mixed, jax.Array)  # it gives more only where residuals are asked for
    return jnp.swapaxes(mixed, 1, 2)


def _block_sizes(queries: int, keys: int) -> splash.BlockSizes:
    q, kv = (max(size for size in (LANES, 2 * LANES, BLOCK) if length % size == 0) for length in (queries, keys))
    return splash.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=kv,
        block_q_dq=q,
        block_kv_dq=kv,
    )


def _spec(*axes: Any) -> PartitionSpec:
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]  # JAX's
