"""The fused kernel's mathematics against plain attention, without a TPU: the kernel is interpreted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launcher.mesh import MeshConfig
from launcher.models.attention import Places, dense_attention
from launcher.models.fused_attention import FusedAttention, fits_kernel
from launcher.training.mesh import BATCH, make_layout

LENGTH, HEADS, SIZE = 256, 2, 128


@pytest.mark.parametrize(
    ("is_global", "window", "soft_cap", "kv_heads"),
    [(True, 96, None, 1), (False, 96, None, 1), (False, 96, 5.0, 2), (True, None, None, 2)],
)
def test_the_kernel_computes_what_plain_attention_computes_with_its_gradients(
    is_global: bool, window: int | None, soft_cap: float | None, kv_heads: int
) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (1, LENGTH, HEADS, SIZE))
    key, value = (jax.random.normal(k, (1, LENGTH, kv_heads, SIZE)) for k in keys[1:])
    places = Places(jnp.array([[*range(150), *range(106)]]), jnp.array([[1] * 150 + [2] * 106]))  # two packed documents
    mesh = make_layout(MeshConfig().resolve(1), jax.devices()[:1]).mesh
    fused = FusedAttention(mesh, BATCH, "tensor", "sequence", interpret=True)
    settings = {"queries_at": places, "keys_at": places, "window": window, "scale": SIZE**-0.5, "soft_cap": soft_cap}

    def weighted(attention: object, *inputs: jax.Array) -> jax.Array:
        mixed = attention(*inputs, is_global=jnp.bool_(is_global), **settings)  # type: ignore[operator]
        return jnp.sum(mixed * jnp.cos(jnp.arange(mixed.size).reshape(mixed.shape)))

    def computed(attention: object) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        value_and_gradients = jax.value_and_grad(partial(weighted, attention), argnums=(0, 1, 2))
        result: tuple[jax.Array, tuple[jax.Array, ...]] = jax.jit(value_and_gradients)(query, key, value)
        return result

    (ours, our_gradients), (expected, gradients) = computed(fused), computed(dense_attention)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-2)
    for mine, theirs in zip(our_gradients, gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-3)


@pytest.mark.parametrize(("length", "shards", "size", "fits"), [(2048, 1, 256, True), (2048, 16, 128, True), (2048, 32, 128, False)])
def test_which_sequences_the_kernel_takes(length: int, shards: int, size: int, fits: bool) -> None:
    assert fits_kernel(length, shards, size) is fits
    assert not fits_kernel(100, 1, size)
    assert not fits_kernel(length, 1, 64)
