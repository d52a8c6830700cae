"""Next-token loss without ever holding the logits of a whole batch.

At 4 x 256 tokens and Gemma's 262,144 words the float32 logits alone are 1 GiB, so the sequence is walked in chunks and each chunk's
logits are computed again in the backward pass.
"""

import jax
import jax.numpy as jnp

from launcher.models.words import ALL, Words


def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int,
    soft_cap: float | None = None,
    words: Words = ALL,
) -> tuple[jax.Array, jax.Array]:
    """(sum of weighted losses in nats, sum of weights), both float32 scalars.

    hidden [B, T, d_model], head [vocab, d_model], targets int32 [B, T], weights float32 [B, T]. With a `soft_cap` c the logits x are
    c tanh(x / c). A chunk takes `chunk` positions of every sequence. Where a device has only some of the `words`, the loss is that of the
    sequences of all devices that share them, and the weights are those of its own.
    """
    length = hidden.shape[1]
    pieces = -(-length // chunk)

    @jax.checkpoint
    def body(total: jax.Array, piece: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        h, t, w = (words.gather(x) for x in piece)
        # The head is cast here, so that its gradient is summed over the chunks in the type that it is kept in
        logits = jnp.einsum("btd,vd->btv", h, head.astype(h.dtype), preferred_element_type=jnp.float32)
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        largest = words.largest(jax.lax.stop_gradient(logits.max(axis=-1)))
        chosen = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == (t - words.first)[..., None]
        both = jnp.stack([jnp.exp(logits - largest[..., None]).sum(axis=-1), jnp.where(chosen, logits, 0.0).sum(axis=-1)])
        exponentials, logit = words.sum(both)
        return total + jnp.sum((jnp.log(exponentials) + largest - logit) * w), None

    def split(x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [pieces, B, chunk, ...], padded with zeros."""
        x = jnp.pad(x, [(0, 0), (0, pieces * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], pieces, chunk, *x.shape[2:]), 1, 0)

    cut = (split(hidden), split(targets), split(weights))
    if pieces == 1:
        total, _ = body(jnp.zeros((), jnp.float32), jax.tree.map(lambda x: x[0], cut))
    else:
        total, _ = jax.lax.scan(body, jnp.zeros((), jnp.float32), cut)
    return total, jnp.sum(weights)
