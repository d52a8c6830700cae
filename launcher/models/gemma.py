"""The Gemma 3 decoder in Flax NNX, and its names in the Hugging Face format.

One compiled layer body: the weights of all layers are stacked along a leading "layers" axis and `jax.lax.scan` walks over them, so
that compile time does not grow with depth. A flag per layer chooses the mask and the rotary table (local or global).

Source of the architecture: the Gemma 3 technical report, section 2, and Google's published checkpoints.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from launcher.models.interface import BuildOptions, HFTensor
from launcher.models.variants import Variant

EMBED_AXES = ("vocab", "embed")


class RMSNorm(nnx.Module):
    """Root-mean-square norm scaled by (1 + w), computed in float32. w is [layers?, size]."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str | None, ...], epsilon: float) -> None:
        self.scale = nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (normed * (1.0 + self.scale[...])).astype(x.dtype)


class Layers(nnx.Module):
    """All layers of the decoder as one stack; inside the scan an instance holds a single layer's weights."""

    def __init__(self, v: Variant, keys: Iterator[jax.Array], options: BuildOptions) -> None:
        def weight(axes: tuple[str, ...], shape: tuple[int, ...], fan_in: int) -> nnx.Param[jax.Array]:
            values = jax.random.normal(next(keys), (v.layers, *shape), jnp.float32) * fan_in**-0.5
            return nnx.Param(values, axes=("layers", *axes))

        def norm(size: int, axis: str) -> RMSNorm:
            return RMSNorm((v.layers, size), ("layers", axis), v.norm_epsilon)

        self.variant, self.options = v, options
        self.input_norm = norm(v.d_model, "norm")
        self.query = weight(("embed", "heads", "head_dim"), (v.d_model, v.heads, v.head_dim), v.d_model)
        self.key = weight(("embed", "kv_heads", "head_dim"), (v.d_model, v.kv_heads, v.head_dim), v.d_model)
        self.value = weight(("embed", "kv_heads", "head_dim"), (v.d_model, v.kv_heads, v.head_dim), v.d_model)
        self.query_norm = norm(v.head_dim, "head_dim")
        self.key_norm = norm(v.head_dim, "head_dim")
        self.output = weight(("heads", "head_dim", "embed"), (v.heads, v.head_dim, v.d_model), v.heads * v.head_dim)
        self.post_attention_norm = norm(v.d_model, "norm")
        self.pre_feedforward_norm = norm(v.d_model, "norm")
        self.gate = weight(("embed", "mlp"), (v.d_model, v.d_ff), v.d_model)
        self.up = weight(("embed", "mlp"), (v.d_model, v.d_ff), v.d_model)
        self.down = weight(("mlp", "embed"), (v.d_ff, v.d_model), v.d_ff)
        self.post_feedforward_norm = norm(v.d_model, "norm")

    def __call__(self, x: jax.Array, mask: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
        """x [B, T, d_model], mask [B, 1, T, T], rope cos and sin [B, T, 1, head_dim / 2]."""
        x = x + self.post_attention_norm(self._attend(self.input_norm(x), mask, rope))
        x = x + self.post_feedforward_norm(self._feed_forward(self.pre_feedforward_norm(x)))
        return self.options.constrain(x, ("batch", None, None))

    def _attend(self, x: jax.Array, mask: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
        dtype = self.options.dtype
        query = jnp.einsum("btd,dnh->btnh", x, self.query[...].astype(dtype))
        key = jnp.einsum("btd,dnh->btnh", x, self.key[...].astype(dtype))
        value = jnp.einsum("btd,dnh->btnh", x, self.value[...].astype(dtype))
        query = _rotate(self.query_norm(query), rope)
        key = _rotate(self.key_norm(key), rope)
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask, scale=self.variant.query_scale**-0.5)
        return jnp.einsum("btnh,nhd->btd", mixed, self.output[...].astype(dtype))

    def _feed_forward(self, x: jax.Array) -> jax.Array:
        dtype = self.options.dtype
        gate = jax.nn.gelu(x @ self.gate[...].astype(dtype), approximate=True)
        return (gate * (x @ self.up[...].astype(dtype))) @ self.down[...].astype(dtype)


class Gemma(nnx.Module):
    """Tokens in, hidden states or logits out. Weights are float32; sums run in `options.dtype`, norms and softmax in float32."""

    def __init__(self, variant: Variant, key: jax.Array, options: BuildOptions) -> None:
        keys = iter(jax.random.split(key, 8))
        # 1 / sqrt(d_model): the scaled embedding enters the first layer, and the tied logits leave, with unit variance
        table = jax.random.normal(next(keys), (variant.vocab, variant.d_model), jnp.float32) * variant.d_model**-0.5
        self.embed = nnx.Param(table, axes=EMBED_AXES)
        self.layers = Layers(variant, keys, options)
        self.final_norm = RMSNorm((variant.d_model,), ("norm",), variant.norm_epsilon)
        self.variant, self.options = variant, options

    def hidden(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """The normed output of the last layer, [B, T, d_model].

        tokens, positions, segment_ids: int32 [B, T]. A token sees only tokens of its own segment; segment 0 is padding.
        """
        v, options = self.variant, self.options
        x = self.embed[...][tokens].astype(options.dtype) * jnp.asarray(v.d_model**0.5, options.dtype)
        x = options.constrain(x, ("batch", None, None))
        ropes = _rope_tables(positions, v)
        masks = _masks(segment_ids, v.window)
        graph, weights = nnx.split(self.layers)

        def body(x: jax.Array, layer: tuple[Any, jax.Array]) -> tuple[jax.Array, None]:
            layer_weights, which = layer
            cos, sin = ropes[which]
            return nnx.merge(graph, layer_weights)(x, masks[which], (cos, sin)), None

        which = jnp.array([int(v.is_global(layer)) for layer in range(v.layers)])
        x, _ = jax.lax.scan(jax.checkpoint(body) if options.remat else body, x, (weights, which))
        return self.final_norm(x)

    def head(self) -> jax.Array:
        """The tied output weights, [vocab, d_model], float32."""
        return self.embed[...]

    def logits(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """float32 [B, T, vocab]; for tests and small inputs, training uses the chunked loss."""
        hidden = self.hidden(tokens, positions, segment_ids)
        return jnp.einsum("btd,vd->btv", hidden, self.head().astype(hidden.dtype), preferred_element_type=jnp.float32)


def _rope_tables(positions: jax.Array, v: Variant) -> jax.Array:
    """[2 (local, global), 2 (cos, sin), B, T, 1, head_dim / 2], float32."""
    exponent = jnp.arange(0, v.head_dim, 2, dtype=jnp.float32) / v.head_dim
    local = positions[..., None] * v.rope_local**-exponent
    wide = positions[..., None] / v.rope_global_factor * v.rope_global**-exponent
    angles = jnp.stack([local, wide])[..., None, :]
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)


def _rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding in the half-split layout of the published weights; x is [B, T, heads, head_dim]."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _masks(segment_ids: jax.Array, window: int) -> jax.Array:
    """Who sees whom, bool [2 (local, global), B, 1, T, T]."""
    length = segment_ids.shape[1]
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = same & (distance >= 0)
    return jnp.stack([causal & (distance < window), causal])[:, :, None]


def build(variant: Variant, key: jax.Array, options: BuildOptions) -> Gemma:
    """A new decoder. Call it under `jax.jit` with shardings, so that no host ever holds it whole."""
    return Gemma(variant, key, options)


def hf_config(variant: Variant, dtype: str, max_positions: int) -> dict[str, Any]:
    """`config.json` of transformers' Gemma3ForCausalLM."""
    kinds = ["full_attention" if variant.is_global(layer) else "sliding_attention" for layer in range(variant.layers)]
    factor = variant.rope_global_factor
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": variant.vocab,
        "hidden_size": variant.d_model,
        "intermediate_size": variant.d_ff,
        "num_hidden_layers": variant.layers,
        "num_attention_heads": variant.heads,
        "num_key_value_heads": variant.kv_heads,
        "head_dim": variant.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": variant.norm_epsilon,
        "rope_theta": variant.rope_global,
        "rope_local_base_freq": variant.rope_local,
        "rope_scaling": None if factor == 1.0 else {"rope_type": "linear", "factor": factor},
        "sliding_window": variant.window,
        "sliding_window_pattern": variant.local_per_global + 1,
        "layer_types": kinds,
        "query_pre_attn_scalar": variant.query_scale,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "use_cache": True,
    }


_HF_LAYER_NORMS = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_feedforward_norm": "pre_feedforward_layernorm",
    "post_feedforward_norm": "post_feedforward_layernorm",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
}


def hf_tensors(variant: Variant) -> Iterator[HFTensor]:
    """Every tensor of the Hugging Face file: its name, where it comes from, and its [out, in] shape."""
    v = variant
    queries, keys = v.heads * v.head_dim, v.kv_heads * v.head_dim
    matrices = {
        "query": ("self_attn.q_proj", (v.d_model, queries)),
        "key": ("self_attn.k_proj", (v.d_model, keys)),
        "value": ("self_attn.v_proj", (v.d_model, keys)),
        "output": ("self_attn.o_proj", (queries, v.d_model)),
        "gate": ("mlp.gate_proj", (v.d_model, v.d_ff)),
        "up": ("mlp.up_proj", (v.d_model, v.d_ff)),
        "down": ("mlp.down_proj", (v.d_ff, v.d_model)),
    }
    yield HFTensor("model.embed_tokens.weight", ("embed",), None, (v.vocab, v.d_model), transpose=False)
    for layer in range(v.layers):
        for ours, theirs in _HF_LAYER_NORMS.items():
            size = v.head_dim if ours in ("query_norm", "key_norm") else v.d_model
            yield HFTensor(f"model.layers.{layer}.{theirs}.weight", ("layers", ours, "scale"), layer, (size,), transpose=False)
        for ours, (theirs, shape) in matrices.items():
            yield HFTensor(f"model.layers.{layer}.{theirs}.weight", ("layers", ours), layer, shape, transpose=True)
    yield HFTensor("model.norm.weight", ("final_norm", "scale"), None, (v.d_model,), transpose=False)
