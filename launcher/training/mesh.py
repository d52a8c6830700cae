"""Where arrays live: the mesh of devices, and the one table from logical axes to mesh axes."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from launcher.config import MeshConfig
from launcher.models.interface import Axes, Decoder, Params

AXES = ("data", "fsdp", "tensor")

LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",  # often 1, and then whole
    "mlp": "tensor",
    "head_dim": None,
    "norm": None,
    "layers": None,
}
"""Which mesh axes split an array's axis. The only place that decides it."""


@dataclass(frozen=True)
class Layout:
    """A mesh with the answers to "how is this array split"."""

    mesh: Mesh

    def named(self, axes: Axes, shape: tuple[int, ...] | None = None) -> NamedSharding:
        """The sharding of an array with these axes. Given its shape, an axis that cannot be split evenly stays whole."""
        ways = [LOGICAL_AXES[axis] if axis else None for axis in axes]
        if shape is not None:
            ways = [way if size % self._count(way) == 0 else None for way, size in zip(ways, shape, strict=True)]
        return NamedSharding(self.mesh, PartitionSpec(*ways))  # type: ignore[no-untyped-call]  # JAX's

    def _count(self, way: str | tuple[str, ...] | None) -> int:
        names = way if isinstance(way, tuple) else (way,)
        return math.prod(self.mesh.shape[name] for name in names if name)

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        if self.data_parallel:  # nothing to choose, and not allowed where a device's part is computed by hand (gradients.py)
            return x
        pinned: jax.Array = jax.lax.with_sharding_constraint(x, self.named(axes))  # type: ignore[no-untyped-call]  # JAX's
        return pinned

    @property
    def data_parallel(self) -> bool:
        """Whether every device holds all weights."""
        return bool(self.mesh.shape["fsdp"] == self.mesh.shape["tensor"] == 1)

    @property
    def replicated(self) -> NamedSharding:
        return self.named(())

    @property
    def batch(self) -> NamedSharding:
        """Of [B, ...] arrays."""
        return self.named(("batch",))

    def params(self, abstract: Decoder) -> Params:
        """Shardings in the shape of the model's weights, from the axis names that each weight carries."""
        state = nnx.state(abstract)
        shardings = jax.tree.map(
            lambda variable: self.named(variable.get_metadata()["axes"], variable.get_value().shape),
            state,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
        return dict(nnx.to_pure_dict(shardings))


def make_layout(config: MeshConfig) -> Layout:
    """The mesh over all devices of all processes; `config` must be resolved for that many.

    Axes are of type Auto: the model relies on the compiler to propagate shardings.
    """
    shape = (config.data, config.fsdp, config.tensor)
    return Layout(Mesh(_arrange(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES)))


def _arrange(shape: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    """Devices in the mesh's shape. With several slices the data axis spans them: gradients alone cross the slower network."""
    devices = jax.devices()
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    data, fsdp, tensor = shape
    if slices > 1 and data % slices == 0:
        return mesh_utils.create_hybrid_device_mesh((data // slices, fsdp, tensor), (slices, 1, 1), devices)
    return mesh_utils.create_device_mesh(shape, devices)
