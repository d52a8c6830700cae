"""Optimizers with global-norm clipping and decoupled weight decay, and the schedules of their learning rate."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from launcher.config import TrainingConfig

Schedule = Callable[[jax.Array | int], jax.Array]

_DECAYS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "cosine": lambda progress: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": jnp.ones_like,
}
"""Progress after the warm-up, 0 to 1, to how much of the way down to final_lr_fraction is left."""
_KIND_OF_LEAF = {"scale": "norm", "embed": "embed"}
"""Name of a weight -> what `trainer.no_decay` calls it."""


def make_schedule(config: TrainingConfig) -> Schedule:
    """Learning rate of the update that follows `count` earlier ones.

    Linear from 0 over `warmup_steps` (the first update already moves), then down to final_lr_fraction * lr at the last by a cosine or a
    line, or constant.
    """
    trainer, peak = config.trainer, config.learning_rate
    decay_steps = max(1, trainer.steps - trainer.warmup_steps)

    def schedule(count: jax.Array | int) -> jax.Array:
        update = jnp.asarray(count, jnp.float32) + 1
        warm = update / max(1, trainer.warmup_steps)
        progress = jnp.clip((update - trainer.warmup_steps) / decay_steps, 0.0, 1.0)
        decayed = trainer.final_lr_fraction + (1 - trainer.final_lr_fraction) * _DECAYS[trainer.schedule](progress)
        return peak * jnp.where(update < trainer.warmup_steps, warm, decayed)

    return schedule


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformationExtraArgs:
    """`trainer.optimizer`. What it remembers of a weight in full has the shape, the type and the sharding of that weight."""
    trainer = config.trainer

    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: _KIND_OF_LEAF.get(path[-1].key) not in trainer.no_decay, params)

    return optax.with_extra_args_support(
        optax.chain(
            optax.clip_by_global_norm(trainer.max_grad_norm),
            *_directions(config),
            optax.add_decayed_weights(trainer.weight_decay, mask=decayed),
            optax.scale_by_learning_rate(make_schedule(config)),
        )
    )


def _directions(config: TrainingConfig) -> list[optax.GradientTransformation]:
    """From gradients to the direction of the update, before the learning rate."""
    trainer = config.trainer
    if trainer.optimizer == "adamw":
        return [optax.scale_by_adam(b1=trainer.beta1, b2=trainer.beta2, eps=trainer.epsilon)]
    if trainer.optimizer == "sgd":
        return [optax.trace(decay=trainer.momentum)]
    # Adafactor (Shazeer and Stern 2018) without momentum: updates are clipped to a root-mean-square of 1 and scaled by that of the weights
    return [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()]
