"""The split vocabulary beside the whole one, on eight CPU devices; prints one JSON object, case -> what was found."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from launcher.mesh import MeshConfig
from launcher.models.vocabulary import WHOLE, SplitVocabulary, Vocabulary
from launcher.training.mesh import BATCH, make_layout

BATCH_SIZE, LENGTH, WORDS, SIZE = 8, 16, 64, 8
CASES: dict[str, tuple[dict[str, int], int, float | None]] = {
    "fsdp": ({"fsdp": 8}, 4, None),
    "all but sequence": ({"data": 2, "fsdp": 2, "tensor": 2}, 1, 2.0),
    "sequence": ({"fsdp": 2, "sequence": 2, "tensor": 2}, 4, None),
    "whole on every device": ({"data": 8}, 2, None),
    "two slices": ({"fsdp": 4, "slices": 2}, 2, 2.0),
}
"""Name -> (mesh, in how many pieces tokens are looked up and losses computed, soft cap)."""


def computed(vocabulary: Vocabulary, soft_cap: float | None, *inputs: jax.Array) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """(mean loss, number of learned tokens, gradients with respect to the table and what is added to its rows)."""
    table, added, tokens, targets, weights = inputs

    def loss(table: jax.Array, added: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = jnp.tanh(vocabulary.lookup(table, tokens, jnp.float32) + added)
        total, count = vocabulary.cross_entropy(hidden, table, targets, weights, soft_cap)
        return total / count, count

    (mean, count), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(table, added)
    return mean, count, gradients


def compare(axes: dict[str, int], pieces: int, soft_cap: float | None) -> dict[str, float]:
    layout = make_layout(MeshConfig(**axes).resolve(8, axes.get("slices", 1)))
    mesh = layout.mesh.shape
    tokens_together = BATCH_SIZE // layout.batch_shards * mesh["fsdp"] * LENGTH // mesh["sequence"] // pieces
    words = WORDS // mesh["fsdp"] // mesh["tensor"]
    split = SplitVocabulary(layout.mesh, BATCH, "sequence", ("fsdp", "tensor"), tokens_together, tokens_together * words)
    rng = np.random.default_rng(0)
    table, added = (rng.normal(size=shape).astype(np.float32) for shape in ((WORDS, SIZE), (BATCH_SIZE, LENGTH, SIZE)))
    tokens, targets = (rng.integers(0, WORDS, (BATCH_SIZE, LENGTH), np.int32) for _ in range(2))
    weights = (rng.random((BATCH_SIZE, LENGTH)) > 0.3).astype(np.float32)
    inputs = [jnp.asarray(x) for x in (table, added, tokens, targets, weights)]
    expected = jax.jit(computed, static_argnums=(0, 1))(WHOLE, soft_cap, *inputs)
    places = [layout.named(("vocab", None)), layout.named(("batch", "length", None)), *[layout.batch] * 3]
    placed = [jax.device_put(x, place) for x, place in zip(inputs, places, strict=True)]
    ours = jax.jit(computed, static_argnums=(0, 1))(split, soft_cap, *placed)
    apart = jax.tree.map(lambda mine, theirs: float(np.abs(np.asarray(mine) - np.asarray(theirs)).max()), ours, expected)
    return {
        "pieces": pieces,
        "loss": float(expected[0]),
        "gradient": float(jnp.abs(expected[2][0]).max()),
        "apart": max(jax.tree.leaves(apart)),
    }


def compare_short_texts() -> dict[str, float]:
    """Of three tokens, which two devices cannot split: as the texts that a model writes are looked up."""
    layout = make_layout(MeshConfig(fsdp=4, sequence=2).resolve(8))
    table = jax.random.normal(jax.random.key(0), (WORDS, SIZE))
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(4, 3)
    found = jax.jit(layout.vocabulary.lookup, static_argnums=2)(table, tokens, jnp.float32)
    return {"apart": float(jnp.abs(found - table[tokens]).max())}


if __name__ == "__main__":
    print(json.dumps({name: compare(*case) for name, case in CASES.items()} | {"short texts": compare_short_texts()}))
