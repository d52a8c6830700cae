"""Which words of the vocabulary a device has, and what devices that share a vocabulary do together.

A split vocabulary is "vocabulary parallel" (Shoeybi et al. 2019, Megatron-LM, section 3), with one difference: one of the axes that split
the words splits the batch as well. Its devices work on the sequences of all of them, each with its own words.
"""

from dataclasses import dataclass
from typing import Protocol

import jax


class Words(Protocol):
    """The words of one device, and its part in what all that share the vocabulary compute."""

    @property
    def first(self) -> jax.Array | int:
        """The number of its first word."""
        ...

    def gather(self, x: jax.Array) -> jax.Array:
        """[B, ...] of this device -> the same of all devices whose sequences it works on, one after another."""
        ...

    def sum(self, x: jax.Array) -> jax.Array:
        """Over all words, of what every device has summed over its own."""
        ...

    def scatter(self, x: jax.Array) -> jax.Array:
        """The transposed of `gather`: its own sequences' part of the sum over all that gather from each other."""
        ...

    def largest(self, x: jax.Array) -> jax.Array:
        """Of all words, of what is every device's largest."""
        ...


class AllWords:
    """Of a device that shares nothing."""

    first = 0

    def gather(self, x: jax.Array) -> jax.Array:
        return x

    def sum(self, x: jax.Array) -> jax.Array:
        return x

    def scatter(self, x: jax.Array) -> jax.Array:
        return x

    def largest(self, x: jax.Array) -> jax.Array:
        return x


ALL = AllWords()


@dataclass(frozen=True)
class SplitWords:
    """Of a device under `shard_map`."""

    shared: str
    """The mesh axis that splits the batch and the words."""
    other: str
    """The one that splits the words alone, faster than `shared`."""
    count: int
    """How many words every device has."""

    @property
    def first(self) -> jax.Array:
        place: jax.Array = jax.lax.axis_index((self.shared, self.other))
        return place * self.count

    def gather(self, x: jax.Array) -> jax.Array:
        gathered: jax.Array = jax.lax.all_gather(x, self.shared, tiled=True)
        return gathered

    def sum(self, x: jax.Array) -> jax.Array:
        summed: jax.Array = jax.lax.psum(x, (self.shared, self.other))  # type: ignore[no-untyped-call]  # JAX's
        return summed

    def largest(self, x: jax.Array) -> jax.Array:
        largest: jax.Array = jax.lax.pmax(x, (self.shared, self.other))  # type: ignore[no-untyped-call]  # JAX's
        return largest

    def scatter(self, x: jax.Array) -> jax.Array:
        own: jax.Array = jax.lax.psum_scatter(x, self.shared, tiled=True)  # type: ignore[no-untyped-call]  # JAX's
        return own

    def sum_own(self, x: jax.Array) -> jax.Array:
        """Like `sum`, of this device's sequences alone."""
        return self.scatter(jax.lax.psum(x, self.other))  # type: ignore[no-untyped-call]  # JAX's
