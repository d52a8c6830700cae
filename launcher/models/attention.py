"""Attention of queries over keys: the one place where another kernel plugs in (`BuildOptions.attention`)."""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

_UNSEEN = -1e30
"""Far below any logit, and no infinity: a row that sees nothing gives no NaN."""


class Places(NamedTuple):
    """Where tokens stand, int32 [B, T] each. A query sees a key of its own segment that is not behind it."""

    positions: jax.Array
    """Counted from the beginning of the segment, without gaps."""
    segment_ids: jax.Array


class KVCache(NamedTuple):
    """What tokens that are already read have left for those that follow, for S places in all."""

    keys: jax.Array
    """[layers, B, S, kv_heads, head_dim], rotated; inside the scan over layers without the first axis."""
    values: jax.Array
    places: Places
    """[B, S]; segment 0 where nothing is yet."""


class Attention(Protocol):
    """Softmax attention with grouped heads."""

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
        """[B, T, heads, head_dim], the type of `value`, from query [B, T, heads, head_dim] and key and value [B, S, kv_heads, head_dim].

        `is_global` is a traced bool, since one layer body serves both kinds of layers; a kernel made for one mask chooses by
        `jax.lax.cond`. Where it is false a query sees the newest `window` tokens, itself included. Logits are multiplied by `scale`,
        and then become c tanh(x / c) where `soft_cap` gives a c.
        """
        ...


def dense_attention(
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
    """All T x S logits at once, softmax in float32; runs on any device."""
    batch, length, heads, size = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, length, groups, heads // groups, size)
    logits = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    seen = _seen(queries_at, keys_at, is_global, window)
    logits = jnp.where(seen[:, None, None], logits, _UNSEEN)
    shares = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", shares, value).reshape(batch, length, heads, size)


def _seen(queries_at: Places, keys_at: Places, is_global: jax.Array, window: int | None) -> jax.Array:
    """Who sees whom, bool [B, T, S]."""
    distance = queries_at.positions[:, :, None] - keys_at.positions[:, None, :]
    same = queries_at.segment_ids[:, :, None] == keys_at.segment_ids[:, None, :]
    causal = same & (distance >= 0)
    return causal if window is None else causal & (is_global | (distance < window))
