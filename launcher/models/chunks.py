"""How long the pieces are that the loss is computed in; importable without JAX."""

CHUNK_ELEMENTS = 9 << 22
"""Logits of one chunk, over all sequences: 144 MiB in float32, small beside the activations of a model with such a head. A little more than
a power of two, since vocabularies are: Gemma 3's of 262,208 words would otherwise have 63 positions for a chunk instead of 64.
"""


def chunk_length(batch: int, length: int, vocab: int, limit: int = CHUNK_ELEMENTS) -> int:
    """How many positions one chunk takes: the whole sequence when its logits fit `limit`, else fewer, at least one.

    A divisor of the length where there is one worth it, so that nothing is padded.
    """
    most = max(1, min(length, limit // (batch * vocab)))
    even = next(size for size in range(most, 0, -1) if length % size == 0)
    return even if 2 * even > most else most
