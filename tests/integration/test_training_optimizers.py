"""Adafactor and SGD as the job runs them, against their definitions in numpy. (AdamW: test_gemma_reference.py, against torch.)"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.typing import NDArray

from launcher.config import TrainingConfig
from launcher.training.optimizer import make_optimizer

Array = NDArray[np.float64]
Moments = dict[str, Any]
STEPS, LR, DECAY, CLIP, MOMENTUM = 6, 0.05, 0.1, 150.0, 0.8
WARMUP = 3
SHAPES = {
    ("embed",): (140, 130),
    ("layers", "query", "kernel"): (3, 130, 4, 150),
    ("layers", "input_norm", "scale"): (3, 130),
    ("layers", "down", "kernel"): (3, 50, 130),
}
"""Two whose second moments are factored (over axes of at least 128) and two whose are not; a scale does not decay."""


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(x * x)))


def sgd(gradient: Array, _weight: Array, moments: Moments, _step: int) -> Array:
    moments["sum"] = gradient + MOMENTUM * moments.get("sum", 0.0)
    return np.asarray(moments["sum"])


def adafactor(gradient: Array, weight: Array, moments: Moments, step: int) -> Array:
    """Shazeer and Stern 2018, algorithms 4 and 5 without momentum: epsilon 1e-30 and 1e-3, clipping at 1, decay 1 - step^-0.8."""
    square, decay = gradient * gradient + 1e-30, 1 - step**-0.8

    def kept(name: str, new: Array) -> Array:
        moments[name] = decay * moments.get(name, 0.0) + (1 - decay) * new
        return np.asarray(moments[name])

    *_, rows, columns = np.argsort(gradient.shape, kind="stable")
    if gradient.shape[rows] >= 128:
        by_row = kept("rows", square.mean(columns, keepdims=True))
        by_column = kept("columns", square.mean(rows, keepdims=True))
        second = by_row * by_column / by_row.mean(rows, keepdims=True)
    else:
        second = kept("all", square)
    update = gradient / np.sqrt(second)
    update = update / max(1.0, rms(update))
    return np.asarray(update * max(1e-3, rms(weight)))


@pytest.mark.parametrize("definition", [sgd, adafactor])
def test_six_updates_are_those_of_the_definition(definition: Callable[[Array, Array, Moments, int], Array]) -> None:
    rng = np.random.default_rng(0)
    expected = {path: rng.normal(size=shape) for path, shape in SHAPES.items()}
    moments: dict[tuple[str, ...], Moments] = {path: {} for path in SHAPES}
    optimizer = make_optimizer(config(definition.__name__))
    ours = tree(expected)
    state = optimizer.init(ours)
    update = jax.jit(optimizer.update)
    for step in range(1, STEPS + 1):
        gradients = {path: rng.normal(scale=step / 5, size=shape) for path, shape in SHAPES.items()}
        updates, state = update(tree(gradients), state, ours)
        ours = optax.apply_updates(ours, updates)
        norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        assert (norm > CLIP) == (step > 1), "one that is not clipped, and others that are"
        for path, gradient in gradients.items():
            direction = definition(gradient * min(1.0, CLIP / norm), expected[path], moments[path], step)
            decayed = 0.0 if path[-1] == "scale" else DECAY * expected[path]
            expected[path] = expected[path] - LR * min(1.0, step / WARMUP) * (direction + decayed)
    for path, values in expected.items():
        np.testing.assert_allclose(at(ours, path), values, rtol=1e-5, atol=1e-6, err_msg=".".join(path))


def config(optimizer: str) -> TrainingConfig:
    trainer = {
        "optimizer": optimizer,
        "steps": STEPS,
        "lr": LR,
        "schedule": "constant",
        "warmup_steps": WARMUP,
        "weight_decay": DECAY,
        "max_grad_norm": CLIP,
        "momentum": MOMENTUM,
    }
    return TrainingConfig.from_dict({"model": {"variant": "gemma3-nano"}, "data": {"source": "python_stdlib"}, "trainer": trainer})


def tree(values: dict[tuple[str, ...], Array]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in values.items():
        place = nested
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = jnp.asarray(value, jnp.float32)
    return nested


def at(nested: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        nested = nested[name]
    return nested
