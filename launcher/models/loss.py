"""Next-token loss without ever holding the logits of a whole batch.

At 4 x 256 tokens and Gemma's 262,144 words the float32 logits alone are 1 GiB, so the sequence is walked in chunks. A chunk's part of the
gradients is worked out while its logits are there, so that the product with the head, most of what a small model computes, is not done
again in the backward pass.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal

from launcher.models.words import ALL, Words

Arrays = tuple[jax.Array, ...]
Residuals = tuple[jax.Array, jax.Array | None]
"""The gradients of hidden and head."""


def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int,
    soft_cap: float | None = None,
    words: Words = ALL,
) -> tuple[jax.Array, jax.Array]:
    """(sum of weighted losses in nats, sum of weights), both float32 scalars. Without a gradient with respect to the weights.

    hidden [B, T, d_model], head [vocab, d_model], targets int32 [B, T], weights float32 [B, T]. With a `soft_cap` c the logits x are
    c tanh(x / c). A chunk takes `chunk` positions of every sequence. Where a device has only some of the `words`, the loss is that of the
    sequences of all devices that share them, and the weights are those of its own.
    """
    return _total(chunk, soft_cap, words, hidden, head, targets, weights), jnp.sum(weights)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _total(
    chunk: int, soft_cap: float | None, words: Words, hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    def add(total: jax.Array, piece: Arrays) -> tuple[jax.Array, None]:
        h, t, w = (words.gather(x) for x in piece)
        return total + _losses(soft_cap, words, h, head.astype(h.dtype), t, w).total, None

    total: jax.Array = _walk(add, jnp.zeros((), jnp.float32), chunk, (hidden, targets, weights))[0]
    return total


def _forward(
    chunk: int,
    soft_cap: float | None,
    words: Words,
    hidden: CustomVJPPrimal,
    head: CustomVJPPrimal,
    targets: CustomVJPPrimal,
    weights: CustomVJPPrimal,
) -> tuple[jax.Array, Residuals]:
    """The gradient of a head that is not trained is left out."""

    def add(sums: tuple[jax.Array, jax.Array | None], piece: Arrays) -> tuple[tuple[jax.Array, jax.Array | None], jax.Array]:
        total, head_gradient = sums
        h, t, w = (words.gather(x) for x in piece)
        narrow = head.value.astype(h.dtype)
        found = _losses(soft_cap, words, h, narrow, t, w)
        slopes = found.slopes(soft_cap, w).astype(h.dtype)
        own = words.scatter(jnp.einsum("btv,vd->btd", slopes, narrow))
        if head_gradient is not None:
            head_gradient += jnp.einsum("btv,btd->vd", slopes, h, preferred_element_type=head_gradient.dtype)
        return (total + found.total, head_gradient), own

    nothing = jnp.zeros_like(head.value) if head.perturbed else None
    first = (jnp.zeros((), jnp.float32), nothing)
    (total, head_gradient), pieces = _walk(add, first, chunk, (hidden.value, targets.value, weights.value))
    rows, length, size = hidden.value.shape
    return total, (jnp.moveaxis(pieces, 0, 1).reshape(rows, -1, size)[:, :length], head_gradient)


def _backward(
    _chunk: int, _soft_cap: float | None, words: Words, found: Residuals, slope: jax.Array
) -> tuple[jax.Array, jax.Array | None, None, None]:
    """Devices that share the words have the same sum of losses, and each of them its part of `slope`. What is found for hidden states that
    several have is summed up over them by who gave them those (`jax.shard_map`).
    """
    slope = words.sum(slope)
    hidden, head = found
    return (hidden * slope).astype(hidden.dtype), None if head is None else head * slope, None, None


_total.defvjp(_forward, _backward, symbolic_zeros=True)


class _Losses(NamedTuple):
    """Of one chunk."""

    total: jax.Array
    logits: jax.Array
    exponentials: jax.Array
    """Of the logits less the largest of each position."""
    sums: jax.Array
    """Of the exponentials, over all words."""
    chosen: jax.Array
    """Which word came next, one of 0 and 1 for each."""

    def slopes(self, soft_cap: float | None, weights: jax.Array) -> jax.Array:
        """The gradient of the total with respect to the logits as they were before the cap."""
        slopes = (self.exponentials / self.sums[..., None] - self.chosen) * weights[..., None]
        return slopes if soft_cap is None else slopes * (1 - (self.logits / soft_cap) ** 2)


def _losses(soft_cap: float | None, words: Words, hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> _Losses:
    logits = jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    largest = words.largest(logits.max(axis=-1))
    exponentials = jnp.exp(logits - largest[..., None])
    chosen = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == (targets - words.first)[..., None]
    sums, logit = words.sum(jnp.stack([exponentials.sum(axis=-1), jnp.where(chosen, logits, 0.0).sum(axis=-1)]))
    return _Losses(jnp.sum((jnp.log(sums) + largest - logit) * weights), logits, exponentials, sums, chosen)


def _walk(step: Any, first: Any, chunk: int, arrays: Arrays) -> tuple[Any, Any]:
    """`jax.lax.scan` over [B, chunk, ...] of each of [B, T, ...]; what is missing in the last is zeros."""
    length = arrays[0].shape[1]
    pieces = -(-length // chunk)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, pieces * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], pieces, chunk, *x.shape[2:]), 1, 0)

    if pieces > 1:
        return jax.lax.scan(step, first, tuple(split(x) for x in arrays))
    last, made = step(first, arrays)
    return last, None if made is None else made[None]
