"""Next-token loss without ever holding the logits of a whole batch.

At 4 x 256 tokens and Gemma's 262,144 words the float32 logits alone are 1 GiB, so the sequence is walked in chunks and each chunk's
logits are computed again in the backward pass.
"""

import jax
import jax.numpy as jnp


def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int,
    soft_cap: float | None = None,
    parts: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """(sum of weighted losses in nats, sum of weights), both float32 scalars.

    hidden [B, T, d_model], head [vocab, d_model], targets int32 [B, T], weights float32 [B, T]. With a `soft_cap` c the logits x are
    c tanh(x / c). A sequence may lie in `parts` equal parts on as many devices: then a chunk takes `chunk` positions of each of them.
    """
    length = hidden.shape[1] // parts
    pieces = -(-length // chunk)
    head = head.astype(hidden.dtype)

    @jax.checkpoint
    def body(total: jax.Array, piece: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        h, t, w = piece
        logits = jnp.einsum("bptd,vd->bptv", h, head, preferred_element_type=jnp.float32)
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        chosen = jnp.take_along_axis(logits, t[..., None], axis=-1)[..., 0]
        return total + jnp.sum((jax.nn.logsumexp(logits, axis=-1) - chosen) * w), None

    def split(x: jax.Array) -> jax.Array:
        """[B, parts * length, ...] -> [pieces, B, parts, chunk, ...], padded with zeros."""
        x = x.reshape(x.shape[0], parts, length, *x.shape[2:])
        x = jnp.pad(x, [(0, 0), (0, 0), (0, pieces * chunk - length)] + [(0, 0)] * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(*x.shape[:2], pieces, chunk, *x.shape[3:]), 2, 0)

    cut = (split(hidden), split(targets), split(weights))
    if pieces == 1:
        total, _ = body(jnp.zeros((), jnp.float32), jax.tree.map(lambda x: x[0], cut))
    else:
        total, _ = jax.lax.scan(body, jnp.zeros((), jnp.float32), cut)
    return total, jnp.sum(weights)
