"""The shape of a decoder: plain numbers, importable without JAX. The published shapes stand with their families."""

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
    query_scale: float
    """Attention logits are divided by the square root of this."""
    default_lr: float
    summary: str
    generation: int
    """Of the family: decides the names in the published weights."""
    window: int | None = None
    """How many tokens a local layer sees, itself included; None where every layer is global."""
    local_per_global: int = 0
    """Local layers between two global ones; layer i is global when (i + 1) % (local_per_global + 1) == 0."""
    rope_local: float = 10_000.0
    rope_global: float = 10_000.0
    rope_global_factor: float = 1.0
    """Positions of global layers are divided by this (linear scaling)."""
    post_norms: bool = True
    """Whether what attention and feed-forward give is normed again before it is added."""
    query_key_norm: bool = False
    attention_soft_cap: float | None = None
    """c: attention logits x become c tanh(x / c)."""
    final_soft_cap: float | None = None
    """The same for the logits over the vocabulary."""
    norm_epsilon: float = 1e-6

    @property
    def parameters(self) -> int:
        """How many weights the decoder has (embeddings are tied, so counted once)."""
        return self.layers * (self._layer_matrices + self._layer_norms) + self.vocab * self.d_model + self.d_model

    @property
    def _layer_matrices(self) -> int:
        return self.d_model * (self.head_dim * (2 * self.heads + 2 * self.kv_heads) + 3 * self.d_ff)

    @property
    def _layer_norms(self) -> int:
        return (4 if self.post_norms else 2) * self.d_model + (2 * self.head_dim if self.query_key_norm else 0)

    def flops_per_token(self, seq_len: int, *, frozen: bool = False) -> float:
        """Floating-point operations of one training step per token: 6 for every weight in a matrix product, and 12 x heads x
        head_dim for every (query, key) pair that a layer computes (forward and backward; PaLM, appendix B), causal or windowed. `frozen`: 4
        for every weight, which get no gradient; those of adapters are not counted.
        """
        pairs = 0.0
        for layer in range(self.layers):
            span = seq_len if self.window is None or self.is_global(layer) else min(self.window, seq_len)
            pairs += (span + 1) / 2 if span == seq_len else span - span * (span - 1) / (2 * seq_len)
        matrices = self.layers * self._layer_matrices + self.vocab * self.d_model
        return (4.0 if frozen else 6.0) * matrices + 12.0 * self.heads * self.head_dim * pairs

    def is_global(self, layer: int) -> bool:
        return (layer + 1) % (self.local_per_global + 1) == 0

    def check_sharding(self, fsdp: int, tensor: int) -> None:
        """Raises ConfigError when weights cannot be split this many ways."""
        for axis, ways, sizes in (
            ("fsdp", fsdp, {"d_model": self.d_model}),
            ("tensor", tensor, {"heads": self.heads, "d_ff": self.d_ff}),
            ("fsdp x tensor", fsdp * tensor, {"vocab": self.vocab}),
        ):
            for name, size in sizes.items():
                if size % ways:
                    raise ConfigError(f"trainer.mesh.{axis} {ways} does not divide the model's {name} of {size}; choose a divisor of it")
