"""What the trainer expects of a decoder, and what it gives it to be built with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from launcher.models.attention import Attention, KVCache, dense_attention
from launcher.models.lora import LoraOptions
from launcher.models.vocabulary import WHOLE, Vocabulary

Axes = tuple[str | None, ...]
Params = dict[str, Any]
"""Nested plain dicts of arrays: the weights of a model without its code."""


def unconstrained(x: jax.Array, _axes: Axes) -> jax.Array:
    """The `constrain` of a model that runs on one device."""
    return x


@dataclass(frozen=True)
class BuildOptions:
    """How a model computes; changes no weight."""

    dtype: DTypeLike = jnp.float32
    """Of the matrix products; weights stay float32."""
    remat: str = "none"
    """What of a layer is computed again in the backward pass instead of kept: none, dots (all but the matrix products) or full."""
    constrain: Callable[[jax.Array, Axes], jax.Array] = unconstrained
    """Pins an activation to the mesh by the logical names of its axes."""
    attention: Attention = dense_attention
    vocabulary: Vocabulary = WHOLE
    lora: LoraOptions | None = None


class Decoder(Protocol):
    """A causal language model with a hidden state per token and an output matrix."""

    @property
    def final_soft_cap(self) -> float | None:
        """c, where the logits x over the vocabulary become c tanh(x / c)."""
        ...

    def hidden(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """[B, T, d_model] from int32 [B, T] each. Without a key nothing is dropped."""
        ...

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty one."""
        ...

    def extend(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, cache: KVCache, at: jax.Array | int
    ) -> tuple[jax.Array, KVCache]:
        """`hidden` of tokens that follow what the cache holds, and the cache with them in its places from `at` on, the same in all
        rows.
        """
        ...

    def head(self) -> jax.Array:
        """Output weights, [vocab, d_model]."""
        ...
