"""One training step on one kind of slice: what every estimate starts from."""

import math
from dataclasses import dataclass

from cluster.tpu.catalog import AcceleratorType
from launcher.config import TrainingConfig
from launcher.mesh import MeshConfig
from launcher.models.chunks import chunk_length
from launcher.models.variants import Variant

FUSED_BLOCK = 128
"""The fused attention kernel takes sequences of multiples of this, and heads of such sizes (launcher/models/fused_attention.py)."""


@dataclass(frozen=True)
class Weight:
    """One kind of tensor of the model."""

    name: str
    size: int
    """Elements, over all layers."""
    layers: int
    """How many layers share `size`; 0 for what is outside of them."""
    shards: int
    """Over how many chips of a slice it is split."""
    gathered: int
    """Over how many of these it is gathered before it is used."""

    @property
    def held(self) -> float:
        """Elements on one chip."""
        return self.size / self.shards

    @property
    def used(self) -> float:
        """Elements on one chip when it is used, of one layer."""
        return self.size / max(1, self.layers) / self.shards * self.gathered


@dataclass(frozen=True)
class StepShape:
    """A step of `config` on chips laid out as `mesh` (resolved)."""

    config: TrainingConfig
    mesh: MeshConfig
    on_tpu: bool = True

    @property
    def variant(self) -> Variant:
        return self.config.model.shape

    @property
    def element(self) -> int:
        """Bytes of one element where sums are computed."""
        return 2 if self.config.trainer.compute_dtype == "bfloat16" else 4

    @property
    def rows(self) -> int:
        """Sequences on one chip."""
        return self.config.trainer.batch_size // self.mesh.batch_shards

    @property
    def length(self) -> int:
        """Tokens of each of these on one chip."""
        return self.config.trainer.seq_len // self.mesh.shape["sequence"]

    @property
    def tokens(self) -> int:
        """On one chip."""
        return self.rows * self.length

    @property
    def global_tokens(self) -> int:
        return self.config.trainer.batch_size * self.config.trainer.seq_len

    @property
    def chips(self) -> int:
        return math.prod(self.mesh.shape.values())

    @property
    def fused(self) -> bool:
        """Whether attention goes through the fused kernel."""
        return self.on_tpu and self.length % FUSED_BLOCK == 0 and self.variant.head_dim % FUSED_BLOCK == 0

    @property
    def heads(self) -> float:
        """Query heads on one chip."""
        return self.variant.heads / self.mesh.shape["tensor"]

    @property
    def kv_heads(self) -> float:
        """Key and value heads on one chip; what cannot be split evenly stays whole."""
        kv_heads, tensor = self.variant.kv_heads, self.mesh.shape["tensor"]
        return kv_heads / tensor if kv_heads % tensor == 0 else kv_heads

    @property
    def chunk_logits(self) -> int:
        """Logits of one chunk of the loss on one chip."""
        vocab = self.variant.vocab // self.mesh.shape["tensor"]
        return self.rows * vocab * chunk_length(self.rows, self.length, vocab)

    @property
    def weights(self) -> list[Weight]:
        """Every kind of tensor, split as `launcher/training/mesh.py` splits it."""
        v, fsdp, tensor = self.variant, self.mesh.shape["fsdp"], self.mesh.shape["tensor"]
        kv_tensor = tensor if v.kv_heads % tensor == 0 else 1
        queries, keys = v.heads * v.head_dim, v.kv_heads * v.head_dim
        matrices = [
            Weight("embedding", v.vocab * v.d_model, 0, fsdp * tensor, fsdp),
            Weight("attention", 2 * v.layers * v.d_model * queries, v.layers, fsdp * tensor, fsdp),
            Weight("keys and values", 2 * v.layers * v.d_model * keys, v.layers, fsdp * kv_tensor, fsdp),
            Weight("feed-forward", 3 * v.layers * v.d_model * v.d_ff, v.layers, fsdp * tensor, fsdp),
        ]
        norms = v.parameters - sum(matrix.size for matrix in matrices)
        return [*matrices, Weight("norms", norms, v.layers, 1, 1)]


def libtpu_topology(kind: AcceleratorType) -> str:
    """How libtpu calls the slice: v5e:4x4."""
    return f"{kind.generation}:{kind.topology}"
