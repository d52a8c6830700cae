"""How long the pieces are that the loss is computed in; importable without JAX."""

CHUNK_ELEMENTS = 1 << 25
"""Logits of one chunk, over all sequences: 128 MiB in float32, small beside the activations of a model with such a head."""


def chunk_length(batch: int, length: int, vocab: int, limit: int = CHUNK_ELEMENTS) -> int:
    """How many positions one chunk takes: the whole sequence when its logits fit `limit`, else fewer, at least one."""
    return max(1, min(length, limit // (batch * vocab)))
