"""Gemma 1, 2 and 3: the published text sizes, and their names in the Hugging Face format.

Sources of the shapes: Google's reference implementation (github.com/google-deepmind/gemma, gemma/gm/nn) and the `config.json`
files of the published checkpoints; of the architecture: the technical reports of Gemma (2024-03, table 1), Gemma 2 (2024-07, table 1
and section 2) and Gemma 3 (2025-03, section 2).
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from launcher.models.hf import HFTensor
from launcher.models.variants import Variant

if TYPE_CHECKING:
    import jax

    from launcher.models.interface import BuildOptions, Decoder

_GENERATIONS: dict[int, dict[str, Any]] = {
    1: {"vocab": 256_000, "post_norms": False},
    2: {
        "vocab": 256_000,
        "window": 4096,
        "local_per_global": 1,
        "attention_soft_cap": 50.0,
        "final_soft_cap": 30.0,
    },
    3: {
        "vocab": 262_208,
        "window": 1024,
        "local_per_global": 5,
        "rope_global": 1_000_000.0,
        "rope_global_factor": 8.0,
        "query_key_norm": True,
    },
}
_SMALL_GEMMA3 = {"vocab": 262_144, "window": 512, "rope_global_factor": 1.0}
_MULTIMODAL = "the text part of the multimodal model"


def _gemma(generation: int, layers: int, d_model: int, heads: int, kv_heads: int, d_ff: int, **more: Any) -> Variant:
    shape = {"head_dim": 256, "query_scale": 256.0, "default_lr": 1e-4, **_GENERATIONS[generation], **more}
    return Variant("gemma", layers, d_model, heads, kv_heads, d_ff=d_ff, generation=generation, **shape)


VARIANTS: Mapping[str, Variant] = {
    "gemma3-nano": _gemma(
        3,
        6,
        192,
        4,
        1,
        768,
        head_dim=64,
        vocab=320,
        window=64,
        query_scale=64.0,
        rope_global_factor=1.0,
        default_lr=3e-3,
        summary="for trying things on any machine; byte-level vocabulary",
    ),
    "gemma3-270m": _gemma(3, 18, 640, 4, 1, 2048, **_SMALL_GEMMA3, default_lr=3e-4, summary="fits one chip of any generation"),
    "gemma3-1b": _gemma(3, 26, 1152, 4, 1, 6912, **_SMALL_GEMMA3, default_lr=2e-4, summary="the default on TPU profiles"),
    "gemma3-4b": _gemma(3, 34, 2560, 8, 4, 10240, summary=_MULTIMODAL),
    "gemma3-12b": _gemma(3, 48, 3840, 16, 8, 15360, summary=_MULTIMODAL),
    "gemma3-27b": _gemma(3, 62, 5376, 32, 16, 21504, head_dim=128, query_scale=168.0, default_lr=5e-5, summary=_MULTIMODAL),
    "gemma2-2b": _gemma(2, 26, 2304, 8, 4, 9216, summary="the smallest of the second generation"),
    "gemma2-9b": _gemma(2, 42, 3584, 16, 8, 14336, summary="the middle of the second generation"),
    "gemma2-27b": _gemma(
        2, 46, 4608, 32, 16, 36864, head_dim=128, query_scale=144.0, default_lr=5e-5, summary="the largest of the second generation"
    ),
    "gemma-2b": _gemma(1, 18, 2048, 8, 1, 16384, summary="the smaller of the first generation"),
    "gemma-7b": _gemma(1, 28, 3072, 16, 16, 24576, summary="the larger of the first generation"),
}


def build(variant: Variant, key: "jax.Array", options: "BuildOptions") -> "Decoder":
    from launcher.models.decoder import Transformer

    return Transformer(variant, key, options)


_MODEL_TYPES = {1: ("GemmaForCausalLM", "gemma"), 2: ("Gemma2ForCausalLM", "gemma2"), 3: ("Gemma3ForCausalLM", "gemma3_text")}


def hf_config(variant: Variant, dtype: str, max_positions: int) -> dict[str, Any]:
    """`config.json` of transformers' Gemma, Gemma 2 or Gemma 3 (text)."""
    architecture, model_type = _MODEL_TYPES[variant.generation]
    common = {
        "architectures": [architecture],
        "model_type": model_type,
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
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    return common | (_hf_first(variant) if variant.generation == 1 else _hf_windowed(variant))


def _hf_first(_variant: Variant) -> dict[str, Any]:
    return {"hidden_act": "gelu_pytorch_tanh"}


def _hf_windowed(variant: Variant) -> dict[str, Any]:
    """What Gemma 2 and 3 add."""
    kinds = ["full_attention" if variant.is_global(layer) else "sliding_attention" for layer in range(variant.layers)]
    windowed = {
        "sliding_window": variant.window,
        "layer_types": kinds,
        "query_pre_attn_scalar": int(variant.query_scale),  # transformers refuses a float
        "attn_logit_softcapping": variant.attention_soft_cap,
        "final_logit_softcapping": variant.final_soft_cap,
    }
    if variant.generation == 2:
        return windowed
    factor = variant.rope_global_factor
    return windowed | {
        "rope_local_base_freq": variant.rope_local,
        "rope_scaling": None if factor == 1.0 else {"rope_type": "linear", "factor": factor},
        "sliding_window_pattern": variant.local_per_global + 1,
    }


_HF_DEFAULTS: dict[int, dict[str, Any]] = {  # what transformers takes for what a config.json leaves out (configuration_gemma*.py)
    1: {"hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16},
    2: {
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window_pattern": 2,
    },
    3: {
        "vocab_size": 262_208,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
    },
}
_COMMON_DEFAULTS: dict[str, Any] = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
}


def hf_shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of a Variant that a config.json decides. Raises ValueError for what no Gemma of ours can be."""
    if "text_config" in config:  # the multimodal models
        config = config["text_config"]
    generations = {model_type: generation for generation, (_, model_type) in _MODEL_TYPES.items()}
    if (generation := generations.get(str(config.get("model_type")))) is None:
        raise ValueError(f"its model_type is {config.get('model_type')!r}, known are {', '.join(generations)}")
    get = {**_COMMON_DEFAULTS, **_HF_DEFAULTS[generation], **config}
    shape = {
        "generation": generation,
        "layers": get["num_hidden_layers"],
        "d_model": get["hidden_size"],
        "heads": get["num_attention_heads"],
        "kv_heads": get["num_key_value_heads"],
        "head_dim": get["head_dim"],
        "d_ff": get["intermediate_size"],
        "vocab": get["vocab_size"],
        "norm_epsilon": get["rms_norm_eps"],
        "query_scale": float(get.get("query_pre_attn_scalar", get["head_dim"])),
        "window": get.get("sliding_window") if generation > 1 else None,
        "local_per_global": _local_per_global(get) if generation > 1 else 0,
        "attention_soft_cap": get.get("attn_logit_softcapping"),
        "final_soft_cap": get.get("final_logit_softcapping"),
        "post_norms": generation > 1,
        "query_key_norm": generation > 2,
    }
    return shape | _ropes(get)


def _local_per_global(get: Mapping[str, Any]) -> int:
    kinds = get.get("layer_types")
    if kinds is None:
        return int(get["sliding_window_pattern"]) - 1
    local = kinds.index("full_attention") if "full_attention" in kinds else len(kinds)
    wanted = ["full_attention" if (layer + 1) % (local + 1) == 0 else "sliding_attention" for layer in range(len(kinds))]
    if kinds != wanted or len(kinds) != get["num_hidden_layers"]:
        raise ValueError("its layer_types are no regular pattern of local and global layers")
    return int(local)


def _ropes(get: Mapping[str, Any]) -> dict[str, float]:
    """From either of the ways in which versions of transformers have written them."""
    parameters = get.get("rope_parameters") or {}
    wide = parameters.get("full_attention", parameters) or get.get("rope_scaling") or {}
    near = parameters.get("sliding_attention", parameters)
    kind = wide.get("rope_type", wide.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ValueError(f"its rotary positions are scaled by {kind!r}, known is linear")
    base = float(wide.get("rope_theta", get["rope_theta"]))
    return {
        "rope_global": base,
        "rope_global_factor": float(wide.get("factor", 1.0)) if kind == "linear" else 1.0,
        "rope_local": float(near.get("rope_theta", get.get("rope_local_base_freq", base))),
    }


_NORMS = {
    1: {"input_norm": "input_layernorm", "pre_feedforward_norm": "post_attention_layernorm"},
    2: {
        "input_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "pre_feedforward_norm": "pre_feedforward_layernorm",
        "post_feedforward_norm": "post_feedforward_layernorm",
    },
}
_NORMS[3] = _NORMS[2] | {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}


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
        for ours, theirs in _NORMS[v.generation].items():
            size = v.head_dim if ours in ("query_norm", "key_norm") else v.d_model
            yield HFTensor(f"model.layers.{layer}.{theirs}.weight", ("layers", ours, "scale"), layer, (size,), transpose=False)
        for ours, (theirs, shape) in matrices.items():
            yield HFTensor(f"model.layers.{layer}.{theirs}.weight", ("layers", ours, "kernel"), layer, shape, transpose=True)
    yield HFTensor("model.norm.weight", ("final_norm", "scale"), None, (v.d_model,), transpose=False)
