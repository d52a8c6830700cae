"""The decoder in Flax NNX: what Gemma 1, 2 and 3 are, each with its own `Variant`.

One compiled layer body: the weights of all layers are stacked along a leading "layers" axis and `jax.lax.scan` walks over them, so
that compile time does not grow with depth. A flag per layer chooses the mask and the rotary table (local or global).

Sources of the architecture: the technical reports of Gemma, Gemma 2 (section 2) and Gemma 3 (section 2).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from launcher.models.attention import KVCache, Places, dense_attention
from launcher.models.interface import BuildOptions
from launcher.models.lora import LoraOptions
from launcher.models.variants import Variant

EMBED_AXES = ("vocab", None)
Sizes = dict[str, int]
"""Logical name of an axis -> its size, in order."""
Keys = tuple[jax.Array | None, ...]


class RMSNorm(nnx.Module):
    """Root-mean-square norm scaled by (1 + w), computed in float32. w is [layers?, size]."""

    def __init__(self, sizes: Sizes, epsilon: float) -> None:
        self.scale = nnx.Param(jnp.zeros(tuple(sizes.values()), jnp.float32), axes=tuple(sizes))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (normed * (1.0 + self.scale[...])).astype(x.dtype)


class Linear(nnx.Module):
    """A matrix product over the last axes of x, without bias. Weights are [layers, *inputs, *outputs], inside the scan without layers.

    An adapter adds scale * (dropout(x) a) b, with a [layers, *inputs, rank] and b [layers, rank, *outputs]; at first b is zero.
    """

    def __init__(self, layers: int, inputs: Sizes, outputs: Sizes, key: jax.Array, lora: LoraOptions | None) -> None:
        shape = (*inputs.values(), *outputs.values())
        self.axes = len(inputs)
        values = jax.random.normal(key, (layers, *shape), jnp.float32) * math.prod(inputs.values()) ** -0.5
        self.kernel = nnx.Param(values, axes=("layers", *inputs, *outputs))
        self.lora = lora
        if lora is not None:
            bound = math.prod(inputs.values()) ** -0.5  # as PEFT begins
            shape = (layers, *inputs.values(), lora.rank)
            a = jax.random.uniform(jax.random.fold_in(key, 1), shape, jnp.float32, -bound, bound)
            self.lora_a = nnx.Param(a, axes=("layers", *inputs, "rank"))
            self.lora_b = nnx.Param(jnp.zeros((layers, lora.rank, *outputs.values()), jnp.float32), axes=("layers", "rank", *outputs))

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        result = jnp.tensordot(x, self.kernel[...].astype(x.dtype), self.axes)
        if self.lora is None:
            return result
        if dropout_key is not None:
            kept = jax.random.bernoulli(dropout_key, 1 - self.lora.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.lora.dropout), 0).astype(x.dtype)
        low = jnp.tensordot(x, self.lora_a[...].astype(x.dtype), self.axes)
        return result + jnp.tensordot(low, self.lora_b[...].astype(x.dtype), 1) * self.lora.scale


class Layers(nnx.Module):
    """All layers of the decoder as one stack; inside the scan an instance holds a single layer's weights."""

    def __init__(self, v: Variant, keys: Iterator[jax.Array], options: BuildOptions) -> None:
        def linear(name: str, inputs: Sizes, outputs: Sizes) -> Linear:
            lora = options.lora if options.lora and name in options.lora.targets else None
            return Linear(v.layers, inputs, outputs, next(keys), lora)

        def norm(axis: str, size: int) -> RMSNorm:
            return RMSNorm({"layers": v.layers, axis: size}, v.norm_epsilon)

        embed, mlp = {"embed": v.d_model}, {"mlp": v.d_ff}
        heads, kv_heads = {"heads": v.heads, "head_dim": v.head_dim}, {"kv_heads": v.kv_heads, "head_dim": v.head_dim}
        self.variant, self.options = v, options
        self.input_norm = norm("norm", v.d_model)
        self.query, self.key = linear("query", embed, heads), linear("key", embed, kv_heads)
        self.value = linear("value", embed, kv_heads)
        self.output = linear("output", heads, embed)
        self.pre_feedforward_norm = norm("norm", v.d_model)
        self.gate, self.up, self.down = linear("gate", embed, mlp), linear("up", embed, mlp), linear("down", mlp, embed)
        if v.post_norms:
            self.post_attention_norm, self.post_feedforward_norm = norm("norm", v.d_model), norm("norm", v.d_model)
        if v.query_key_norm:
            self.query_norm, self.key_norm = norm("head_dim", v.head_dim), norm("head_dim", v.head_dim)

    def __call__(
        self,
        x: jax.Array,
        places: Places,
        rope: jax.Array,
        is_global: jax.Array,
        dropout_key: jax.Array | None = None,
        cache: KVCache | None = None,
        at: jax.Array | int = 0,
    ) -> tuple[jax.Array, KVCache | None]:
        """x [B, T, d_model], rope [2 (cos, sin), B, T, 1, head_dim / 2], is_global a bool scalar. `cache`: of this layer; it
        knows the places of x already, which begin at `at`.
        """
        keys = (None,) * 7 if dropout_key is None else tuple(jax.random.split(dropout_key, 7))
        attended, cache = self._attend(self.input_norm(x), places, rope, is_global, keys[:4], cache, at)
        x = x + (self.post_attention_norm(attended) if self.variant.post_norms else attended)
        fed = self._feed_forward(self.pre_feedforward_norm(x), keys[4:])
        x = x + (self.post_feedforward_norm(fed) if self.variant.post_norms else fed)
        return self.options.constrain(x, ("batch", "length", None)), cache

    def _attend(
        self,
        x: jax.Array,
        places: Places,
        rope: jax.Array,
        is_global: jax.Array,
        keys: Keys,
        cache: KVCache | None,
        at: jax.Array | int,
    ) -> tuple[jax.Array, KVCache | None]:
        v = self.variant
        query, (key, value) = self.query(x, keys[0]), _both(x, self.key, self.value, keys[1:3])
        if v.query_key_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = _rotate(query, rope), _rotate(key, rope)
        keys_at, attention = places, self.options.attention
        if cache is not None:
            key = jax.lax.dynamic_update_slice_in_dim(cache.keys, key, at, axis=1)
            value = jax.lax.dynamic_update_slice_in_dim(cache.values, value, at, axis=1)
            cache = KVCache(key, value, cache.places)
            keys_at, attention = cache.places, dense_attention  # another kernel may be made for queries and keys in the same places
        mixed = attention(
            query,
            key,
            value,
            queries_at=places,
            keys_at=keys_at,
            is_global=is_global,
            window=v.window,
            scale=v.query_scale**-0.5,
            soft_cap=v.attention_soft_cap,
        )
        return self.output(mixed, keys[3]), cache

    def _feed_forward(self, x: jax.Array, keys: Keys) -> jax.Array:
        gate, up = _both(x, self.gate, self.up, keys[:2])
        return self.down(jax.nn.gelu(gate, approximate=True) * up, keys[2])


class Transformer(nnx.Module):
    """Tokens in, hidden states or logits out. Weights are float32; sums run in `options.dtype`, norms and softmax in float32."""

    def __init__(self, variant: Variant, key: jax.Array, options: BuildOptions) -> None:
        keys = iter(jax.random.split(key, 8))
        # 1 / sqrt(d_model): the scaled embedding enters the first layer, and the tied logits leave, with unit variance
        table = jax.random.normal(next(keys), (variant.vocab, variant.d_model), jnp.float32) * variant.d_model**-0.5
        self.embed = nnx.Param(table, axes=EMBED_AXES)
        self.layers = Layers(variant, keys, options)
        self.final_norm = RMSNorm({"norm": variant.d_model}, variant.norm_epsilon)
        self.variant, self.options = variant, options

    @property
    def final_soft_cap(self) -> float | None:
        return self.variant.final_soft_cap

    def hidden(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """The normed output of the last layer, [B, T, d_model].

        tokens, positions, segment_ids: int32 [B, T]. A token sees only tokens of its own segment; segment 0 is padding.
        """
        ropes, places = _rope_tables(positions, self.variant), Places(positions, segment_ids)
        graph, weights = nnx.split(self.layers)

        def body(x: jax.Array, layer: tuple[Any, jax.Array, jax.Array | None]) -> tuple[jax.Array, None]:
            layer_weights, is_global, key = layer
            rope = jnp.where(is_global, ropes[1], ropes[0])
            return nnx.merge(graph, layer_weights)(x, places, rope, is_global, key)[0], None

        keys = None if dropout_key is None else jax.random.split(dropout_key, self.variant.layers)
        x, _ = jax.lax.scan(_rematted(body, self.options.remat), self._embedded(tokens), (weights, self._kinds, keys))
        return self.final_norm(x)

    def new_cache(self, batch: int, length: int) -> KVCache:
        v = self.variant
        held = jnp.zeros((v.layers, batch, length, v.kv_heads, v.head_dim), self.options.dtype)
        held = self.options.constrain(held, ("layers", "batch", None, "kv_heads", "head_dim"))
        nowhere = jnp.zeros((batch, length), jnp.int32)
        return KVCache(held, held, Places(nowhere, nowhere))

    def extend(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, cache: KVCache, at: jax.Array | int
    ) -> tuple[jax.Array, KVCache]:
        ropes, places = _rope_tables(positions, self.variant), Places(positions, segment_ids)
        known = Places(*(jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=1) for old, new in zip(cache.places, places, strict=True)))
        graph, weights = nnx.split(self.layers)

        def body(x: jax.Array, layer: tuple[Any, jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            layer_weights, is_global, keys, values = layer
            rope = jnp.where(is_global, ropes[1], ropes[0])
            x, held = nnx.merge(graph, layer_weights)(x, places, rope, is_global, None, KVCache(keys, values, known), at)
            assert held is not None
            return x, (held.keys, held.values)

        x, (keys, values) = jax.lax.scan(body, self._embedded(tokens), (weights, self._kinds, cache.keys, cache.values))
        return self.final_norm(x), KVCache(keys, values, known)

    def _embedded(self, tokens: jax.Array) -> jax.Array:
        v, options = self.variant, self.options
        x = options.vocabulary.lookup(self.embed[...], tokens, options.dtype) * jnp.asarray(v.d_model**0.5, options.dtype)
        return options.constrain(x, ("batch", "length", None))

    @property
    def _kinds(self) -> jax.Array:
        """Whether each layer is a global one."""
        return jnp.array([self.variant.is_global(layer) for layer in range(self.variant.layers)])

    def head(self) -> jax.Array:
        """The tied output weights, [vocab, d_model], float32."""
        return self.embed[...]

    def logits(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """float32 [B, T, vocab]; for tests and small inputs, training uses the chunked loss."""
        hidden = self.hidden(tokens, positions, segment_ids)
        logits = jnp.einsum("btd,vd->btv", hidden, self.head().astype(hidden.dtype), preferred_element_type=jnp.float32)
        cap = self.final_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def _both(x: jax.Array, one: Linear, other: Linear, keys: Keys) -> tuple[jax.Array, jax.Array]:
    """What two of the same shape give: by one product of x where their weights are cast and so copied anyway, into one array then.

    The fewer products there are, with their gradients and their collectives, the sooner all are compiled: a tenth less of the TPU
    compiler's work for Gemma 3 of 270M and 4B. Where nothing is cast, the copy would cost more than it is worth.
    """
    if one.lora is not None or other.lora is not None or one.kernel[...].dtype == x.dtype:
        return one(x, keys[0]), other(x, keys[1])
    kernels = jnp.stack([linear.kernel[...].astype(x.dtype) for linear in (one, other)])
    outputs = "fg"[: kernels.ndim - 2]
    first, second = jnp.einsum(f"btd,pd{outputs}->pbt{outputs}", x, kernels)
    return first, second


def _rematted(body: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """`body` of a scan, whose activations the backward pass computes again."""
    if remat == "none":
        return body
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(body, policy=policy, prevent_cse=False)  # inside a scan nothing can be merged with the forward pass


def _rope_tables(positions: jax.Array, v: Variant) -> jax.Array:
    """[2 (local, global), 2 (cos, sin), B, T, 1, head_dim / 2], float32."""
    exponent = jnp.arange(0, v.head_dim, 2, dtype=jnp.float32) / v.head_dim
    local = positions[..., None] * v.rope_local**-exponent
    wide = positions[..., None] / v.rope_global_factor * v.rope_global**-exponent
    angles = jnp.stack([local, wide])[..., None, :]
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)


def _rotate(x: jax.Array, rope: jax.Array) -> jax.Array:
    """Rotary embedding in the half-split layout of the published weights; x is [B, T, heads, head_dim]."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
