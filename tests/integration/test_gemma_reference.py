"""Our decoder against transformers: the numbers that tests/references/make_gemma.py wrote, of tiny models with the whole structure."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from launcher.config import TrainingConfig
from launcher.data.tokenizer import ByteTokenizer
from launcher.models import lora
from launcher.models.decoder import Transformer
from launcher.models.families import gemma
from launcher.models.registry import VARIANTS
from launcher.training.export import export_adapters, export_model
from launcher.training.loading import load_params
from launcher.training.mesh import make_layout
from launcher.training.optimizer import make_optimizer
from launcher.training.state import Blueprint, TrainState, make_blueprint
from launcher.training.step import compile_steps
from launcher.weights.check import check_weights

REFERENCES = Path(__file__).resolve().parents[1] / "references" / "gemma"
MODELS = ("gemma", "gemma2", "gemma3", "gemma3-long")
Expected = dict[str, np.ndarray[Any, Any]]


class Reference:
    """One model of transformers', loaded as a user's."""

    def __init__(self, name: str) -> None:
        self.folder = REFERENCES / name
        with np.load(self.folder / "expected.npz") as arrays:
            self.expected = dict(arrays)
        self.blueprint = blueprint_of(self.folder)
        self.params = load(self.blueprint, self.blueprint.abstract.params)
        self._logits = jax.jit(self._compute)

    def logits(self, tokens: Any, segments: Any = None, positions: Any = None) -> np.ndarray[Any, Any]:
        tokens = jnp.asarray(tokens, jnp.int32)
        segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments, jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if positions is None else jnp.asarray(positions)
        return np.asarray(self._logits(self.params, tokens, positions, segments))

    def _compute(self, params: Any, *inputs: jax.Array) -> jax.Array:
        model: Transformer = nnx.merge(self.blueprint.graph, params)
        return model.logits(*inputs)


def blueprint_of(folder: Path, lora: dict[str, Any] | None = None, **trainer: Any) -> Blueprint:
    values = {
        "model": {"variant": "reference", "weights": str(folder), "lora": lora or {}},
        "data": {"source": "python_stdlib"},
        "trainer": trainer,
    }
    config = TrainingConfig.from_dict(values)
    return make_blueprint(config, make_layout(config.check_devices(jax.device_count())), make_optimizer(config))


def load(blueprint: Blueprint, abstract: Any) -> Any:
    weights = check_weights(blueprint.config.model)
    assert weights is not None
    return load_params(weights, blueprint.config.model, blueprint.layout, abstract)


@pytest.fixture(scope="module", params=MODELS)
def reference(request: pytest.FixtureRequest) -> Iterator[Reference]:
    shape = gemma.hf_shape(json.loads((REFERENCES / request.param / "config.json").read_text()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "reference", dataclasses.replace(VARIANTS["gemma3-nano"], **shape))
        yield Reference(request.param)


def close(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.5, "the reference says something"
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_logits_are_those_of_transformers_at_every_position(reference: Reference) -> None:
    expected, window = reference.expected, reference.blueprint.config.model.shape.window
    assert window is None or expected["tokens"].shape[1] > 2 * window
    close(reference.logits(expected["tokens"]), expected["logits"])


def test_padding_changes_nothing(reference: Reference) -> None:
    expected = reference.expected
    lengths = expected["padded_lengths"]
    segments = np.arange(expected["tokens"].shape[1])[None] < lengths[:, None]
    ours = reference.logits(expected["tokens"], segments)
    for row, length in enumerate(lengths):
        close(ours[row, :length], expected["padded_logits"][row, :length])


def test_two_packed_documents_are_each_alone(reference: Reference) -> None:
    expected = reference.expected
    first, second = expected["documents"]
    segments = [[1] * first + [2] * second]
    positions = [[*range(first), *range(second)]]
    packed = reference.logits(expected["tokens"][:1, : first + second], segments, positions)
    close(packed[:, :first], expected["first_logits"])
    close(packed[:, first:], expected["second_logits"])


MADE_WITH = json.loads((REFERENCES / "made_with.json").read_text())["settings"]
STEPS = 5
TRAINER = {
    "steps": STEPS,
    "batch_size": 4,
    "seq_len": 23,
    "schedule": "constant",
    "warmup_steps": 0,
    "lr": MADE_WITH["adamw"]["lr"],
    "beta1": MADE_WITH["adamw"]["betas"][0],
    "beta2": MADE_WITH["adamw"]["betas"][1],
    "epsilon": MADE_WITH["adamw"]["eps"],
    "weight_decay": MADE_WITH["weight_decay"],
    "max_grad_norm": MADE_WITH["max_grad_norm"],
}
LORA = {"rank": MADE_WITH["lora"]["r"], "alpha": float(MADE_WITH["lora"]["lora_alpha"])}


def batch(expected: Expected, step: int) -> dict[str, jax.Array]:
    rows, learned = expected["batches"][step], expected["learned"][step]
    tokens = jnp.asarray(rows[:, :-1], jnp.int32)
    return {
        "tokens": tokens,
        "targets": jnp.asarray(rows[:, 1:], jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape),
        "segment_ids": jnp.ones_like(tokens),
        "weights": jnp.asarray(learned[:, 1:], jnp.float32),
    }


def losses(blueprint: Blueprint, state: TrainState, frozen: Any, expected: Expected) -> tuple[list[float], TrainState]:
    """Before every step and after the last, by our own compiled steps."""
    steps = compile_steps(blueprint).with_frozen(frozen)
    found = []
    for step in range(STEPS):
        state, metrics = steps.train(state, batch(expected, step))
        found.append(float(metrics.loss))
        assert float(metrics.update_norm) > 0
    total, count = steps.evaluate(state.params, batch(expected, STEPS - 1))
    return [*found, float(total / count)], state


@pytest.mark.parametrize("accumulate", [1, 2])
def test_five_steps_of_adamw_give_the_losses_of_torch(reference: Reference, accumulate: int) -> None:
    blueprint = blueprint_of(reference.folder, **TRAINER, accumulate=accumulate)
    state = blueprint.init(load(blueprint, blueprint.abstract.params))
    ours, state = losses(blueprint, state, {}, reference.expected)
    np.testing.assert_allclose(ours, reference.expected["full_losses"], rtol=1e-5)


def adapters_from(folder: Path, blueprint: Blueprint) -> Any:
    """What PEFT saved, as our own weights."""
    stored = load_file(folder / "adapter_model.safetensors")

    def fill(path: Any, target: jax.ShapeDtypeStruct) -> jax.Array:
        *_, ours, which = (key.key for key in path)
        names = [tensor.name for tensor in gemma.hf_tensors(blueprint.config.model.shape) if tensor.path == ("layers", ours, "kernel")]
        kind = {"lora_a": "lora_A", "lora_b": "lora_B"}[which]
        layers = [stored[f"base_model.model.{name.removesuffix('.weight')}.{kind}.weight"].T for name in names]
        return jnp.asarray(np.stack(layers).reshape(target.shape))

    return jax.tree_util.tree_map_with_path(fill, blueprint.abstract.params)


def test_five_steps_of_lora_give_the_losses_and_the_adapters_of_peft(reference: Reference, tmp_path: Path) -> None:
    blueprint = blueprint_of(reference.folder, LORA, **TRAINER)
    frozen = load(blueprint, blueprint.frozen)
    leaves = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(blueprint.abstract.params)}
    assert leaves == {"lora_a", "lora_b"}, "nothing else has gradients, moments or a place in checkpoints"
    trained = sum(x.size for x in jax.tree.leaves(blueprint.abstract.params))
    assert sum(x.size for x in jax.tree.leaves(blueprint.abstract.opt_state)) < 2 * trained + 10
    ours, state = losses(
        blueprint, blueprint.init(adapters_from(reference.folder / "adapter_before", blueprint)), frozen, reference.expected
    )
    np.testing.assert_allclose(ours, reference.expected["lora_losses"], rtol=1e-5)
    together = lora.join(state.params, frozen)
    exported = export_adapters(together, blueprint.config, ByteTokenizer(), tmp_path / "adapters", blueprint.layout)
    after = reference.folder / "adapter_after"
    written, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (exported, after))
    assert set(written) == set(theirs)
    for name, values in theirs.items():
        np.testing.assert_allclose(written[name], values, atol=2e-4, err_msg=name)
    settings, known = (json.loads((folder / "adapter_config.json").read_text()) for folder in (exported, after))
    assert set(settings.pop("target_modules")) == set(known["target_modules"])
    assert settings.pop("base_model_name_or_path") == str(reference.folder)
    assert settings == {name: known[name] for name in settings}
    merged = export_model(together, blueprint.config, ByteTokenizer(), tmp_path / "merged", blueprint.layout)
    reference_params = reference.params
    try:
        reference.params = load(blueprint_of(merged), reference.blueprint.abstract.params)
        np.testing.assert_allclose(reference.logits(reference.expected["tokens"]), reference.expected["lora_logits"], atol=1e-3)
    finally:
        reference.params = reference_params
