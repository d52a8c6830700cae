"""A tiny state, and checkpoints of it, made by the real Orbax."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launcher.training.checkpoint import Checkpoints
from launcher.training.reporter import Reporter, SilentReporter
from launcher.training.retention import Retention
from launcher.training.state import TrainState, abstract_array

MEANING = {"trainer.seed": 0, "model.variant": "tiny"}
ROWS = 64


def sharding(split: bool) -> NamedSharding:
    mesh = Mesh(np.array(jax.devices()), ("data",))
    return NamedSharding(mesh, PartitionSpec("data") if split else PartitionSpec())  # type: ignore[no-untyped-call]  # JAX's


def values(step: int) -> np.ndarray[Any, Any]:
    """Different in every place and step, and not compressible: a flipped byte changes a number."""
    return np.random.default_rng(step).standard_normal((ROWS, 16)).astype(np.float32)


def state(step: int, *, split: bool = False) -> TrainState:
    def put(array: Any) -> jax.Array:
        where = sharding(split and array.ndim > 0)
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    weights = put(values(step))
    return TrainState({"w": weights}, {"mu": put(values(step) + 1)}, put(np.int32(step)))


def target(*, split: bool = False) -> TrainState:
    shapes = jax.eval_shape(lambda: TrainState({"w": jnp.zeros((ROWS, 16))}, {"mu": jnp.zeros((ROWS, 16))}, jnp.zeros((), jnp.int32)))
    abstract: TrainState = jax.tree.map(lambda x: abstract_array(x.shape, x.dtype, sharding(split and len(x.shape) > 0)), shapes)
    return abstract


def check(restored: TrainState | None, step: int) -> None:
    """That every number this process holds is that of the step."""
    assert restored is not None
    assert int(restored.step) == step
    for array, expected in ((restored.params["w"], values(step)), (restored.opt_state["mu"], values(step) + 1)):
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])


def open_checkpoints(folder: str | Path, reporter: Reporter | None = None, **options: Any) -> Checkpoints:
    retention = options.pop("retention", Retention(3))
    return Checkpoints(folder, retention, reporter or SilentReporter(), **{"meaning": MEANING, **options})


def save_all(folder: str | Path, steps: list[int], make: Callable[[int], TrainState] = state, **options: Any) -> None:
    checkpoints = open_checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, make(step))
    checkpoints.close()
