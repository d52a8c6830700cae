"""Next-token loss without ever holding the logits of a whole batch.

At 4 x 256 tokens and Gemma's 262,144 words the float32 logits alone are 1 GiB, so the sequence is walked in chunks and each chunk's
logits are computed again in the backward pass.
"""

import jax
import jax.numpy as jnp

CHUNK_ELEMENTS = 1 << 25
"""Logits of one chunk, over all sequences: 128 MiB in float32, small beside the activations of a model with such a head."""


def chunk_length(batch: int, length: int, vocab: int, limit: int = CHUNK_ELEMENTS) -> int:
    """How many positions one chunk takes: the whole sequence when its logits fit `limit`, else fewer, at least one."""
    return max(1, min(length, limit // (batch * vocab)))


def cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int, soft_cap: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """(sum of weighted losses in nats, sum of weights), both float32 scalars.

    hidden [B, T, d_model], head [vocab, d_model], targets int32 [B, T], weights float32 [B, T]. With a `soft_cap` c the logits x are
    c tanh(x / c).
    """
    batch, length, width = hidden.shape
    pieces = -(-length // chunk)
    padding = pieces * chunk - length
    if padding:
        hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
        targets, weights = (jnp.pad(x, ((0, 0), (0, padding))) for x in (targets, weights))
    head = head.astype(hidden.dtype)

    @jax.checkpoint
    def body(total: jax.Array, piece: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        h, t, w = piece
        logits = jnp.einsum("btd,vd->btv", h, head, preferred_element_type=jnp.float32)
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        chosen = jnp.take_along_axis(logits, t[..., None], axis=-1)[..., 0]
        return total + jnp.sum((jax.nn.logsumexp(logits, axis=-1) - chosen) * w), None

    if pieces == 1:
        total, _ = body(jnp.zeros((), jnp.float32), (hidden, targets, weights))
    else:
        split = (
            hidden.reshape(batch, pieces, chunk, width).swapaxes(0, 1),
            targets.reshape(batch, pieces, chunk).swapaxes(0, 1),
            weights.reshape(batch, pieces, chunk).swapaxes(0, 1),
        )
        total, _ = jax.lax.scan(body, jnp.zeros((), jnp.float32), split)
    return total, jnp.sum(weights)
