"""AdamW with global-norm clipping, linear warm-up and cosine decay."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from launcher.config import TrainingConfig

Schedule = Callable[[jax.Array | int], jax.Array]


def make_schedule(config: TrainingConfig) -> Schedule:
    """Learning rate of the update that follows `count` earlier ones.

    Linear from 0 over `warmup_steps` (the first update already moves), then a cosine that reaches final_lr_fraction * lr at the last.
    """
    trainer, peak = config.trainer, config.learning_rate
    decay_steps = max(1, trainer.steps - trainer.warmup_steps)

    def schedule(count: jax.Array | int) -> jax.Array:
        update = jnp.asarray(count, jnp.float32) + 1
        warm = update / max(1, trainer.warmup_steps)
        progress = jnp.clip((update - trainer.warmup_steps) / decay_steps, 0.0, 1.0)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        decayed = trainer.final_lr_fraction + (1 - trainer.final_lr_fraction) * cosine
        return peak * jnp.where(update < trainer.warmup_steps, warm, decayed)

    return schedule


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformationExtraArgs:
    """The optimizer; its moments have the shape, the type and the sharding of the weights."""
    trainer = config.trainer
    return optax.with_extra_args_support(
        optax.chain(
            optax.clip_by_global_norm(trainer.max_grad_norm),
            optax.adamw(
                make_schedule(config),
                b1=trainer.beta1,
                b2=trainer.beta2,
                eps=trainer.epsilon,
                weight_decay=trainer.weight_decay,
                mask=decayed_weights,
            ),
        )
    )


def decayed_weights(params: Any) -> Any:
    """True for matrices, False for the scales of norms: decay would pull a norm's gain towards 1, which regularises nothing."""
    return jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path[-1:]) != "['scale']", params)
