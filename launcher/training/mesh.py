"""Where arrays live: the mesh of devices, and the one table from logical axes to mesh axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from launcher.mesh import MeshConfig
from launcher.models.attention import Attention
from launcher.models.fused_attention import attention_for
from launcher.models.interface import Axes, Decoder, Params
from launcher.models.vocabulary import WHOLE, SplitVocabulary, Vocabulary

AXES = ("slice", "data", "fsdp", "sequence", "tensor")
"""The slowest network first: devices next to each other along the last axis are neighbours."""
BATCH = ("slice", "data", "fsdp")
LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH,
    "length": "sequence",
    "vocab": ("fsdp", "tensor"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",  # often 1, and then whole
    "mlp": "tensor",
    "head_dim": None,
    "norm": None,
    "layers": None,
    "rank": None,
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
        pinned: jax.Array = jax.lax.with_sharding_constraint(x, self.named(axes, x.shape))  # type: ignore[no-untyped-call]  # JAX's
        return pinned

    @property
    def data_parallel(self) -> bool:
        """Whether every device holds all weights and whole sequences."""
        return all(size == 1 for axis, size in self.mesh.shape.items() if axis not in ("slice", "data"))

    @property
    def platform(self) -> str:
        """cpu, gpu or tpu: of the mesh's devices, which a process that only compiles does not have."""
        return str(self.mesh.devices.flat[0].platform)

    @property
    def attention(self) -> Attention:
        return attention_for(self.mesh, BATCH, heads="tensor", sequence="sequence")

    @property
    def vocabulary(self) -> Vocabulary:
        if self.platform == "cpu" and self.data_parallel:  # where a device's part is computed by hand (gradients.py)
            return WHOLE
        return SplitVocabulary(self.mesh, BATCH, length="sequence", words=("fsdp", "tensor"))

    @property
    def replicated(self) -> NamedSharding:
        return self.named(())

    @property
    def batch(self) -> NamedSharding:
        """Of [B, T] arrays."""
        return self.named(("batch", "length"))

    @property
    def rows(self) -> NamedSharding:
        """Of [B, ...] arrays whose sequences are short, or change their length."""
        return self.named(("batch",))

    @property
    def batch_shards(self) -> int:
        return self._count(BATCH)

    def params(self, abstract: Decoder) -> Params:
        """Shardings in the shape of the model's weights, from the axis names that each weight carries."""
        state = nnx.state(abstract)
        shardings = jax.tree.map(
            lambda variable: self.named(variable.get_metadata()["axes"], variable.get_value().shape),
            state,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
        return dict(nnx.to_pure_dict(shardings))


def make_layout(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Layout:
    """The mesh over `devices`, by default all of all processes; `config` must be resolved for that many.

    Axes are of type Auto: the model relies on the compiler to propagate shardings.
    """
    shape = tuple(config.shape[axis] for axis in AXES)
    arranged = _arrange(shape, list(devices if devices is not None else jax.devices()))
    return Layout(Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES)))


def _arrange(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray[Any, Any]:
    """Devices in the mesh's shape, the slices of TPUs along its first axis. An axis may take part of one of the slice's: 2 x 8 of 4 x 4."""
    slices, *within = shape
    if slices > 1 and len({getattr(device, "slice_index", 0) for device in devices}) == slices:
        across = (slices, *[1] * len(within))
        return mesh_utils.create_hybrid_device_mesh((1, *within), across, devices, allow_split_physical_axes=True)
    if slices > 1:  # emulated hosts, whose processes are numbered slice by slice
        return np.array(sorted(devices, key=lambda device: (device.process_index, device.id))).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
