"""What the trainer expects of a model family, whatever its architecture."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from launcher.models.variants import Variant

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
    remat: bool = False
    """Compute a layer's activations again in the backward pass instead of keeping them."""
    constrain: Callable[[jax.Array, Axes], jax.Array] = unconstrained
    """Pins an activation to the mesh by the logical names of its axes."""


class Decoder(Protocol):
    """A causal language model with a hidden state per token and an output matrix."""

    def hidden(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """[B, T, d_model] from int32 [B, T] each."""
        ...

    def head(self) -> jax.Array:
        """Output weights, [vocab, d_model]."""
        ...


@dataclass(frozen=True)
class HFTensor:
    """One tensor of the Hugging Face file and where it comes from."""

    name: str
    path: tuple[str, ...]
    """Its place in our nested dict of weights."""
    layer: int | None
    """Which entry of the leading "layers" axis; None when there is no such axis."""
    shape: tuple[int, ...]
    """Ours with joined heads; when `transpose`, the file holds the reverse ([out, in])."""
    transpose: bool

    @property
    def file_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transpose else self.shape


class Family(Protocol):
    """A module of this package: one file per family."""

    def build(self, variant: Variant, key: jax.Array, options: BuildOptions) -> Decoder: ...

    def hf_config(self, variant: Variant, dtype: str, max_positions: int) -> dict[str, Any]: ...

    def hf_tensors(self, variant: Variant) -> Iterator[HFTensor]: ...
