"""Published weights onto the devices. Every host reads its share of every tensor once; XLA moves the values to where they belong."""

from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from launcher.models.config import ModelConfig
from launcher.models.hf import HFTensor
from launcher.models.interface import Params
from launcher.training.mesh import AXES, Layout
from launcher.weights.check import stored_tensors
from launcher.weights.folder import ModelFolder
from launcher.weights.safetensors_format import StoredTensor


def load_params(folder: ModelFolder, model: ModelConfig, layout: Layout, abstract: Params) -> Params:
    """The weights in the shapes, types and shardings of `abstract`; collective. Raises WeightsError.

    The rows of each tensor of the file are divided evenly among all devices, whatever the sharding that they end in: no byte is read
    twice, none in pieces, and a host holds its share of one tensor at a time.
    """
    params: Params = {}
    by_path = sorted(stored_tensors(model, folder), key=lambda pair: pair[0].path)
    for path, parts in groupby(by_path, key=lambda pair: pair[0].path):
        *parents, name = path
        place = params
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = _load(folder, list(parts), layout, _at(abstract, path))
    return params


def _load(folder: ModelFolder, parts: list[tuple[HFTensor, StoredTensor]], layout: Layout, target: jax.ShapeDtypeStruct) -> jax.Array:
    """One weight of ours from one tensor of the file, or from one for each layer."""
    tensor, stored = parts[0]
    stacked = tensor.layer is not None
    shape = target.shape[1:] if stacked else target.shape

    def arrange(rows: jax.Array) -> jax.Array:
        whole = rows[: stored.shape[0]]
        return (whole.T if tensor.transpose else whole).astype(target.dtype).reshape(shape)

    def put(stack: jax.Array, rows: jax.Array, layer: int) -> jax.Array:
        return stack.at[layer].set(arrange(rows))

    if not stacked:
        return _ready(jax.jit(arrange, out_shardings=target.sharding)(_read(folder, stored, layout)))
    put_layer = jax.jit(put, donate_argnums=0, out_shardings=target.sharding)
    stack: jax.Array = jax.jit(lambda: jnp.zeros(target.shape, target.dtype), out_shardings=target.sharding)()
    for tensor, stored in parts:
        stack = _ready(put_layer(stack, _read(folder, stored, layout), tensor.layer))
    return stack


def _read(folder: ModelFolder, stored: StoredTensor, layout: Layout) -> jax.Array:
    """A tensor as the file has it, its first axis split over all devices and filled up with zeros to a multiple of them."""
    devices = layout.mesh.size
    count = stored.shape[0]
    rows = -(-count // devices) * devices

    def shard(index: tuple[slice, ...] | None) -> np.ndarray[Any, Any]:
        assert index is not None  # the shape is static
        start, stop, _ = index[0].indices(rows)
        read = folder.rows(stored, min(start, count), min(stop, count))
        missing = stop - start - read.shape[0]
        return np.pad(read, [(0, missing), *[(0, 0)] * (read.ndim - 1)]) if missing else read

    spec = PartitionSpec(AXES)  # type: ignore[no-untyped-call]  # JAX's
    return jax.make_array_from_callback((rows, *stored.shape[1:]), NamedSharding(layout.mesh, spec), shard)


def _ready(value: jax.Array) -> jax.Array:
    """Wait for it, so that the host holds one tensor at a time."""
    ready: jax.Array = jax.block_until_ready(value)  # type: ignore[no-untyped-call]  # JAX's
    return ready


def _at(tree: Params, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree
