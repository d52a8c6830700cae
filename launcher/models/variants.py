"""The shapes of the models: plain numbers, importable without JAX.

Source of the Gemma 3 shapes: the `config.json` files that Google publishes with the text models (and the text part of the
multimodal ones), and the Gemma 3 technical report, table 1.
"""

from dataclasses import dataclass

from cluster.errors import ConfigError


@dataclass(frozen=True)
class Variant:
    """The shape of one decoder. Lengths are in elements, windows in tokens."""

    family: str
    layers: int
    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    d_ff: int
    vocab: int
    window: int
    """How many tokens a local layer sees, itself included."""
    query_scale: float
    """Attention logits are divided by the square root of this."""
    default_lr: float
    summary: str
    local_per_global: int = 5
    """Local layers between two global ones; layer i is global when (i + 1) % (local_per_global + 1) == 0."""
    rope_local: float = 10_000.0
    rope_global: float = 1_000_000.0
    rope_global_factor: float = 1.0
    """Positions of global layers are divided by this (linear scaling)."""
    norm_epsilon: float = 1e-6

    @property
    def parameters(self) -> int:
        """How many weights the decoder has (embeddings are tied, so counted once)."""
        attention = self.d_model * self.head_dim * (2 * self.heads + 2 * self.kv_heads) + 2 * self.head_dim
        mlp = 3 * self.d_model * self.d_ff
        norms = 4 * self.d_model
        return self.layers * (attention + mlp + norms) + self.vocab * self.d_model + self.d_model

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of one training step per token: 6 for every weight in a matrix product, and 12 x heads x
        head_dim for every (query, key) pair that a layer computes (forward and backward; PaLM, appendix B), causal or windowed.
        """
        pairs = 0.0
        for layer in range(self.layers):
            span = seq_len if self.is_global(layer) else min(self.window, seq_len)
            pairs += (span + 1) / 2 if span == seq_len else span - span * (span - 1) / (2 * seq_len)
        matrices = self.parameters - self.layers * (4 * self.d_model + 2 * self.head_dim) - self.d_model
        return 6.0 * matrices + 12.0 * self.heads * self.head_dim * pairs

    def is_global(self, layer: int) -> bool:
        return (layer + 1) % (self.local_per_global + 1) == 0

    def check_sharding(self, fsdp: int, tensor: int) -> None:
        """Raises ConfigError when weights cannot be split this many ways."""
        for axis, ways, sizes in (
            ("fsdp", fsdp, {"d_model": self.d_model}),
            ("tensor", tensor, {"heads": self.heads, "d_ff": self.d_ff, "vocab": self.vocab}),
        ):
            for name, size in sizes.items():
                if size % ways:
                    raise ConfigError(f"trainer.mesh.{axis} {ways} does not divide the model's {name} of {size}; choose a divisor of it")


def _gemma3(layers: int, d_model: int, heads: int, kv_heads: int, d_ff: int, **more: object) -> Variant:
    shape: dict[str, object] = {
        "head_dim": 256,
        "vocab": 262_144,
        "window": 1024,
        "query_scale": 256.0,
        "rope_global_factor": 8.0,
        "default_lr": 1e-4,
    }
    return Variant("gemma", layers, d_model, heads, kv_heads, d_ff=d_ff, **{**shape, **more})  # type: ignore[arg-type]  # names checked by tests


VARIANTS: dict[str, Variant] = {
    "gemma3-nano": _gemma3(
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
    "gemma3-270m": _gemma3(
        18, 640, 4, 1, 2048, window=512, rope_global_factor=1.0, default_lr=3e-4, summary="fits one chip of any generation"
    ),
    "gemma3-1b": _gemma3(26, 1152, 4, 1, 6912, window=512, rope_global_factor=1.0, default_lr=2e-4, summary="the default on TPU profiles"),
    "gemma3-4b": _gemma3(34, 2560, 8, 4, 10240, vocab=262_208, summary="the text part of the multimodal model"),
    "gemma3-12b": _gemma3(48, 3840, 16, 8, 15360, vocab=262_208, summary="the text part of the multimodal model"),
    "gemma3-27b": _gemma3(
        62,
        5376,
        32,
        16,
        21504,
        head_dim=128,
        vocab=262_208,
        query_scale=168.0,
        default_lr=5e-5,
        summary="the text part of the multimodal model",
    ),
}
