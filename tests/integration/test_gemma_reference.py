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

from launcher.config import TrainingConfig
from launcher.models.decoder import Transformer
from launcher.models.families import gemma
from launcher.models.registry import VARIANTS
from launcher.training.loading import load_params
from launcher.training.mesh import make_layout
from launcher.training.optimizer import make_optimizer
from launcher.training.state import Blueprint, make_blueprint
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
        self.blueprint = self._blueprint()
        weights = check_weights(self.blueprint.config.model)
        assert weights is not None
        self.params = load_params(weights, self.blueprint.config.model, self.blueprint.layout, self.blueprint.abstract.params)
        self._logits = jax.jit(self._compute)

    def _blueprint(self) -> Blueprint:
        model = {"variant": "reference", "weights": str(self.folder)}
        config = TrainingConfig.from_dict({"model": model, "data": {"source": "python_stdlib"}})
        return make_blueprint(config, make_layout(config.check_devices(jax.device_count())), make_optimizer(config))

    def logits(self, tokens: Any, segments: Any = None, positions: Any = None) -> np.ndarray[Any, Any]:
        tokens = jnp.asarray(tokens, jnp.int32)
        segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments, jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if positions is None else jnp.asarray(positions)
        return np.asarray(self._logits(self.params, tokens, positions, segments))

    def _compute(self, params: Any, *inputs: jax.Array) -> jax.Array:
        model: Transformer = nnx.merge(self.blueprint.graph, params)
        return model.logits(*inputs)


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
