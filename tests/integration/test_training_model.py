"""The decoder against its definition: masks, packing, the chunked loss, counts, and the published weight format."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from launcher.config import TrainingConfig
from launcher.data.config import DataConfig
from launcher.data.tokenizer import ByteTokenizer
from launcher.models.chunks import chunk_length
from launcher.models.config import ModelConfig
from launcher.models.decoder import Transformer
from launcher.models.interface import BuildOptions
from launcher.models.loss import cross_entropy
from launcher.models.registry import VARIANTS
from launcher.models.variants import Variant
from launcher.training.export import export_model
from launcher.training.mesh import make_layout

NANO = VARIANTS["gemma3-nano"]
WINDOW = 4
TINY = dataclasses.replace(NANO, layers=6, d_model=32, heads=4, kv_heads=2, head_dim=8, d_ff=48, vocab=64, window=WINDOW, query_scale=8.0)
TINY_2 = dataclasses.replace(
    TINY,
    generation=2,
    layers=4,
    local_per_global=1,
    rope_global=10_000.0,
    query_key_norm=False,
    attention_soft_cap=2.0,
    final_soft_cap=3.0,
)
TINY_1 = dataclasses.replace(TINY, generation=1, layers=2, local_per_global=0, window=None, query_key_norm=False, post_norms=False)
GENERATIONS = pytest.mark.parametrize("variant", [TINY_1, TINY_2, TINY], ids=["gemma", "gemma2", "gemma3"])
LENGTH = 16


def decoder(variant: Variant = TINY, **options: Any) -> Transformer:
    """With random weights of numpy's, norms among them: so a wrong (1 + w) would show, and no random bits have to be compiled."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(variant, jax.random.key(1), BuildOptions(**options))))
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.2, size=x.shape), jnp.float32), state)
    model: Transformer = nnx.merge(graph, weights)
    return model


def tokens(seed: int = 0, batch: int = 2, length: int = LENGTH) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length), 4, TINY.vocab)


def logits(
    model: Transformer, ids: jax.Array, segments: jax.Array | None = None, positions: jax.Array | None = None
) -> np.ndarray[Any, Any]:
    segments = jnp.ones_like(ids) if segments is None else segments
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape) if positions is None else positions
    return np.asarray(_logits(*nnx.split(model), ids, positions, segments))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: Any, weights: Any, *inputs: jax.Array) -> jax.Array:
    model: Transformer = nnx.merge(graph, weights)
    return model.logits(*inputs)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_parameter_count_is_what_the_variant_says(name: str) -> None:
    variant = VARIANTS[name]
    abstract = nnx.eval_shape(lambda: Transformer(variant, jax.random.key(0), BuildOptions()))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(abstract))) == variant.parameters


@GENERATIONS
def test_a_token_changes_no_logits_before_it(variant: Variant) -> None:
    model, ids = decoder(variant), tokens()
    changed = ids.at[:, 9].set((ids[:, 9] + 1) % TINY.vocab)
    before, after = logits(model, ids), logits(model, changed)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert np.abs(before[:, 9:] - after[:, 9:]).max(axis=(0, 2)).min() > 1e-4


def test_a_local_layer_sees_its_window_and_no_further() -> None:
    model = decoder(dataclasses.replace(TINY, layers=1))
    assert not model.variant.is_global(0)
    ids = tokens()
    changed = ids.at[:, 3].set((ids[:, 3] + 1) % TINY.vocab)
    difference = np.abs(logits(model, ids) - logits(model, changed)).max(axis=(0, 2))
    assert (difference[3 : 3 + WINDOW] > 1e-5).all()
    assert (difference[3 + WINDOW :] == 0).all()


@GENERATIONS
def test_packed_documents_get_what_they_get_alone(variant: Variant) -> None:
    model, ids = decoder(variant), tokens(batch=1)
    segments = jnp.array([[1] * 6 + [2] * 7 + [0] * 3])
    positions = jnp.array([[*range(6), *range(7), *range(3)]])
    packed = logits(model, ids, segments, positions)
    np.testing.assert_allclose(packed[:, :6], logits(model, ids[:, :6]), atol=2e-5)
    np.testing.assert_allclose(packed[:, 6:13], logits(model, ids[:, 6:13]), atol=2e-5)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(remat: str) -> None:
    ids = tokens()

    def loss(model: Transformer) -> jax.Array:
        hidden = model.hidden(ids, jnp.broadcast_to(jnp.arange(LENGTH), ids.shape), jnp.ones_like(ids))
        total, count = cross_entropy(hidden, model.head(), ids, jnp.ones(ids.shape), chunk=5)
        return total / count

    gradients = nnx.jit(nnx.grad(loss))
    plain, again = gradients(decoder()), gradients(decoder(remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, again)


def test_soft_caps_bound_the_logits() -> None:
    model = decoder(TINY_2)
    model.embed[...] = model.embed[...] * 100.0
    assert 2.9 < np.abs(logits(model, tokens())).max() <= 3.0


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("chunk", [1, 5, 8, 16])
def test_chunked_loss_is_the_plain_loss_with_its_gradients(chunk: int, soft_cap: float | None) -> None:
    hidden = jax.random.normal(jax.random.key(0), (2, LENGTH, 8))
    head = jax.random.normal(jax.random.key(1), (32, 8))
    targets = jax.random.randint(jax.random.key(2), (2, LENGTH), 0, 32)
    weights = (jax.random.uniform(jax.random.key(3), (2, LENGTH)) > 0.3).astype(jnp.float32)

    def plain(hidden: jax.Array, head: jax.Array) -> jax.Array:
        logits = hidden @ head.T
        scores = jax.nn.log_softmax(logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap))
        return -jnp.sum(jnp.take_along_axis(scores, targets[..., None], -1)[..., 0] * weights)

    def chunked(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return cross_entropy(hidden, head, targets, weights, chunk, soft_cap)[0]

    expected, expected_grads = jax.value_and_grad(plain, argnums=(0, 1))(hidden, head)
    total, grads = jax.value_and_grad(chunked, argnums=(0, 1))(hidden, head)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(("trained", "products"), [((0, 1), 3), ((0,), 2)], ids=["with the head", "beside a frozen head"])
def test_no_product_with_the_head_is_done_twice(trained: tuple[int, ...], products: int) -> None:
    """Logits, and the gradients of hidden states and head: a chunk's all at once."""
    inputs = jnp.ones((2, LENGTH, 8)), jnp.ones((32, 8)), jnp.ones((2, LENGTH), jnp.int32), jnp.ones((2, LENGTH))
    loss = functools.partial(cross_entropy, chunk=5)
    program = jax.make_jaxpr(jax.grad(lambda *given: loss(*given)[0], argnums=trained))(*inputs)
    assert str(program).count("dot_general[") == products


def test_chunks_bound_the_logits() -> None:
    assert chunk_length(batch=8, length=256, vocab=320) == 256
    assert chunk_length(batch=8, length=2048, vocab=262_144, limit=1 << 25) == 16
    assert chunk_length(batch=4096, length=2048, vocab=262_144) == 1


def test_chunks_are_even_where_they_can_be() -> None:
    assert chunk_length(batch=2, length=2048, vocab=262_208) == 64
    assert chunk_length(batch=2, length=2000, vocab=262_208) == 50
    assert chunk_length(batch=2, length=2003, vocab=262_208) == 71  # a prime: the last chunk is padded


def test_weights_that_are_cast_together_give_what_each_gives_alone() -> None:
    """Pairs of products become one where their weights are cast: with weights that are narrow already they stay two."""
    ids, model = tokens(), decoder(dataclasses.replace(TINY, layers=2), dtype=jnp.bfloat16)
    graph, wide = nnx.split(model)
    narrow = jax.tree.map_with_path(lambda path, x: x.astype(jnp.bfloat16) if "kernel" in jax.tree_util.keystr(path) else x, wide)

    @jax.jit
    def learned(weights: Any) -> tuple[jax.Array, Any]:
        def total(weights: Any) -> jax.Array:
            places = jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)
            return jnp.sum(jnp.tanh(nnx.merge(graph, weights).logits(ids, places, jnp.ones_like(ids))))

        return jax.value_and_grad(total)(weights)

    (together, its_gradients), (alone, gradients) = learned(wide), learned(narrow)
    np.testing.assert_allclose(together, alone, rtol=1e-2)
    for ours, theirs in zip(jax.tree.leaves(its_gradients), jax.tree.leaves(gradients), strict=True):
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        assert np.linalg.norm(ours - theirs) < 0.03 * np.linalg.norm(theirs)


def reference_logits(weights: dict[str, np.ndarray[Any, Any]], config: dict[str, Any], ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Gemma 3 as transformers' modeling_gemma3.py defines it, one sequence, plain numpy, from the exported file alone."""
    heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    length = len(ids)
    steps = np.arange(length)

    def norm(x: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
        size = np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"])
        return np.asarray(x / size * (1 + weights[name + ".weight"]))

    def rotated(x: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
        full = kind == "full_attention"
        base = config["rope_theta"] if full else config["rope_local_base_freq"]
        inverse = base ** -(np.arange(0, size, 2) / size)
        if full and config["rope_scaling"]:
            inverse = inverse / config["rope_scaling"]["factor"]
        angles = np.concatenate([steps[:, None] * inverse] * 2, -1)
        half = np.concatenate([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return np.asarray(x * np.cos(angles) + half * np.sin(angles))

    def split(x: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
        return x.reshape(length, count, size).transpose(1, 0, 2)

    x = weights["model.embed_tokens.weight"][ids] * np.float64(config["hidden_size"]) ** 0.5
    for i, kind in enumerate(config["layer_types"]):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm")
        q, k, v = (split(h @ weights[f"{at}self_attn.{p}_proj.weight"].T, n) for p, n in (("q", heads), ("k", kv_heads), ("v", kv_heads)))
        q, k = rotated(norm(q, at + "self_attn.q_norm"), kind), rotated(norm(k, at + "self_attn.k_norm"), kind)
        k, v = (y.repeat(heads // kv_heads, axis=0) for y in (k, v))
        distance = steps[:, None] - steps[None]
        seen = (distance >= 0) & ((kind == "full_attention") | (distance < config["sliding_window"]))
        scores = np.where(seen, q @ k.transpose(0, 2, 1) * config["query_pre_attn_scalar"] ** -0.5, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        out = mixed.transpose(1, 0, 2).reshape(length, -1) @ weights[f"{at}self_attn.o_proj.weight"].T
        x = x + norm(out, at + "post_attention_layernorm")
        h = norm(x, at + "pre_feedforward_layernorm")
        gate = h @ weights[at + "mlp.gate_proj.weight"].T
        gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        out = (gate * (h @ weights[at + "mlp.up_proj.weight"].T)) @ weights[at + "mlp.down_proj.weight"].T
        x = x + norm(out, at + "post_feedforward_layernorm")
    result: np.ndarray[Any, Any] = norm(x, "model.norm") @ weights["model.embed_tokens.weight"].T
    return result


@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_exported_weights_give_the_same_logits_in_an_independent_implementation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    variant = dataclasses.replace(TINY, rope_global_factor=factor)
    monkeypatch.setitem(VARIANTS, "tiny", variant)
    config = TrainingConfig(ModelConfig("tiny"), DataConfig("python_stdlib"))
    model = decoder(variant)
    layout = make_layout(config.trainer.mesh.resolve(jax.device_count()))
    folder = export_model(dict(nnx.to_pure_dict(nnx.state(model))), config, ByteTokenizer(), tmp_path / "export", layout)
    weights = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    assert settings["architectures"] == ["Gemma3ForCausalLM"]
    assert (settings["bos_token_id"], settings["eos_token_id"], settings["pad_token_id"]) == (2, 1, 0)
    assert sum(x.size for x in weights.values()) == variant.parameters
    ids = tokens()
    for ours, row in zip(logits(model, ids), np.asarray(ids), strict=True):
        np.testing.assert_allclose(ours, reference_logits({k: v.astype(np.float64) for k, v in weights.items()}, settings, row), atol=2e-4)
