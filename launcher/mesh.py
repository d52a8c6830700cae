"""How the chips of a run are laid out: the axes of the mesh, as settings. Pure; `launcher/training/mesh.py` makes the mesh of them."""

import math
from dataclasses import dataclass
from typing import Self

from cluster.errors import ConfigError

AUTO = "auto"
AXES = ("data", "fsdp", "sequence", "tensor")
"""Of one slice."""


@dataclass(frozen=True)
class MeshConfig:
    """How many ways the chips of a slice are split along each axis. null: chosen for the model, the batch and the slice; -1 (at most
    one of them): what is left. `trainer.mesh=auto` is null for all.
    """

    data: int | None = None
    """Every part holds all weights and its share of the batch."""
    fsdp: int | None = None
    """Weights, gradients and optimizer are split, and gathered layer by layer; so is the batch."""
    tensor: int | None = None
    """Heads, feed-forward and vocabulary are split."""
    sequence: int | None = None
    """The tokens of every sequence are split; keys and values are gathered."""
    slices: int | None = None
    """Slices, joined by the data center's network, which gradients alone cross; each has all weights and its share of the batch.
    null: as many as the run has.
    """

    def __post_init__(self) -> None:
        sizes = [size for size in self._sizes.values() if size is not None]
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1 or (self.slices is not None and self.slices < 1):
            raise ConfigError(f"trainer.mesh {self._text}: sizes are at least 1, and at most one of them is -1")

    @classmethod
    def from_word(cls, word: str) -> Self:
        """What stands for a mesh in one word. Raises ConfigError for any but `auto`."""
        if word != AUTO:
            raise ConfigError(f"trainer.mesh {word!r}: give auto, or sizes such as {{fsdp: 8, tensor: 2}}")
        return cls()

    @property
    def is_open(self) -> bool:
        """Whether there is something to choose."""
        return None in self._sizes.values()

    @property
    def _sizes(self) -> dict[str, int | None]:
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def _text(self) -> str:
        given = {axis: size for axis, size in self._sizes.items() if size is not None}
        return "{" + ", ".join(f"{axis}: {size}" for axis, size in given.items()) + "}"

    def resolve(self, devices: int, slices: int = 1) -> "MeshConfig":
        """The same mesh in numbers, for `devices` devices of `slices` slices; what is null becomes 1, or what is left for `data`.

        Raises ConfigError when it does not divide.
        """
        if self.slices not in (None, slices):
            raise ConfigError(f"trainer.mesh.slices is {self.slices} and the run has {slices}; leave it out, or set cluster.slices")
        per_slice, rest = divmod(devices, slices)
        if rest:
            raise ConfigError(f"{devices} devices cannot be {slices} slices of the same size")
        left = -1 if -1 not in self._sizes.values() else 1
        sizes = {axis: (left if axis == "data" else 1) if size is None else size for axis, size in self._sizes.items()}
        given = math.prod(size for size in sizes.values() if size != -1)
        filled = {axis: per_slice // given if size == -1 else size for axis, size in sizes.items()}
        if math.prod(filled.values()) != per_slice:
            where = "devices" if slices == 1 else "devices of a slice"
            raise ConfigError(
                f"trainer.mesh {self._text} does not divide {per_slice} {where}; its product must be {per_slice}, or set one axis to -1"
            )
        return MeshConfig(**filled, slices=slices)

    @property
    def shape(self) -> dict[str, int]:
        """Axis -> size, of a resolved mesh: slice, then those of a slice."""
        sizes = {"slice": self.slices, **self._sizes}
        assert all(size is not None for size in sizes.values()), "resolve it first"
        return {axis: size for axis, size in sizes.items() if size is not None}

    @property
    def batch_shards(self) -> int:
        """Over how many shards the global batch is split, of a resolved mesh."""
        return self.shape["slice"] * self.shape["data"] * self.shape["fsdp"]

    def describe(self) -> str:
        """Of a resolved mesh: the axes that split anything."""
        split = [f"{axis} {size}" for axis, size in self.shape.items() if size > 1]
        return " x ".join(split) or "one device"
