"""The jitted functions of the loop: one training step, one evaluation step."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.stages import Lowered

from launcher.data.batches import Batch, EvalBatches, TrainBatches
from launcher.models.interface import Params
from launcher.training.gradients import DeviceBatch, loss_and_gradients, loss_sums
from launcher.training.mesh import Layout
from launcher.training.optimizer import make_schedule
from launcher.training.state import Blueprint, TrainState, abstract_array


class StepMetrics(NamedTuple):
    """Scalars of one step, float32, on the device."""

    loss: jax.Array
    """Mean nats per learned token."""
    grad_norm: jax.Array
    """Before clipping."""
    update_norm: jax.Array
    """Of what was added to the weights."""
    lr: jax.Array


class CompiledSteps(NamedTuple):
    """Ahead-of-time compiled: the first step costs what every step costs."""

    train: Callable[..., Any]
    """(frozen, state, batch) -> (state, StepMetrics); the state given in is donated. `with_frozen` leaves (state, batch)."""
    evaluate: Callable[..., Any]
    """(frozen, params, batch) -> (sum of losses, sum of weights). `with_frozen` leaves (params, batch)."""

    def with_frozen(self, frozen: Params) -> "CompiledSteps":
        """With the weights beside the adapters given."""
        return CompiledSteps(partial(self.train, frozen), partial(self.evaluate, frozen))


def compile_steps(blueprint: Blueprint) -> CompiledSteps:
    """Compile for the blueprint's shapes and shardings; served from JAX's persistent cache when that is set."""

    def evaluate(frozen: Params, params: Params, batch: DeviceBatch) -> tuple[jax.Array, jax.Array]:
        return loss_sums(blueprint, params, frozen, batch)

    eval_step = jax.jit(evaluate, out_shardings=blueprint.layout.replicated)
    lowered = eval_step.lower(blueprint.frozen, blueprint.abstract.params, _abstract_batch(blueprint))
    return CompiledSteps(lower_train_step(blueprint).compile(), lowered.compile())


def lower_train_step(blueprint: Blueprint) -> Lowered:
    """The training step as the compiler gets it; needs no device of the blueprint's mesh."""
    layout, schedule = blueprint.layout, make_schedule(blueprint.config)

    def train(frozen: Params, state: TrainState, batch: DeviceBatch) -> tuple[TrainState, StepMetrics]:
        loss, grads = loss_and_gradients(blueprint, state.params, frozen, batch, _dropout_key(blueprint, state.step))
        updates, opt_state = blueprint.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = StepMetrics(loss, optax.tree.norm(grads), optax.tree.norm(updates), schedule(state.step))
        return TrainState(params, opt_state, state.step + 1), metrics

    step = jax.jit(train, donate_argnums=1, out_shardings=(blueprint.shardings, layout.replicated))
    return step.lower(blueprint.frozen, blueprint.abstract, _abstract_batch(blueprint))


def _dropout_key(blueprint: Blueprint, step: jax.Array) -> jax.Array | None:
    """Another one at every step, the same after a resume; None where nothing is dropped."""
    lora = blueprint.config.model.lora
    if not lora.rank or not lora.dropout:
        return None
    return jax.random.fold_in(jax.random.key(blueprint.config.trainer.seed + 1), step)


def put_batch(source: TrainBatches | EvalBatches, step: int, layout: Layout) -> DeviceBatch:
    """Batch `step` on the devices. A process reads only the rows that its own devices hold, each once."""
    sharding = layout.batch
    read: dict[tuple[int, int], Batch] = {}

    def rows(index: tuple[slice, ...]) -> Batch:
        start, stop, _ = index[0].indices(source.batch_size)
        if (start, stop) not in read:
            read[start, stop] = source.rows(step, start, stop)
        return read[start, stop]

    def put(field: str) -> jax.Array:
        shape = (source.batch_size, source.seq_len)

        def shard(index: tuple[slice, ...] | None) -> np.ndarray[Any, Any]:
            assert index is not None  # the shape is static
            values: np.ndarray[Any, Any] = getattr(rows(index), field)
            return values[:, index[1]]

        return jax.make_array_from_callback(shape, sharding, shard)

    return {field: put(field) for field in Batch.FIELDS}


def _abstract_batch(blueprint: Blueprint) -> dict[str, jax.ShapeDtypeStruct]:
    trainer = blueprint.config.trainer
    shape, sharding = (trainer.batch_size, trainer.seq_len), blueprint.layout.batch
    types = dict.fromkeys(Batch.FIELDS, jnp.int32) | {"weights": jnp.float32}
    return {field: abstract_array(shape, dtype, sharding) for field, dtype in types.items()}
