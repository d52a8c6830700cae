"""How a family's weights are called in the Hugging Face format; importable without JAX."""

from dataclasses import dataclass


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
    def module(self) -> str:
        """What it is the weight of, as q_proj."""
        return self.name.split(".")[-2]

    @property
    def file_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transpose else self.shape
