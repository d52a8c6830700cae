"""One training step on one kind of slice: what every estimate starts from."""

import functools
import math
from collections.abc import Iterator
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
    trained: bool = True
    """Whether it has a gradient and moments."""
    narrow: bool = False
    """Whether it is kept in the type that is computed in."""
    factored: bool = True
    """Whether Adafactor remembers only its rows and columns."""

    @property
    def held(self) -> float:
        """Elements on one chip."""
        return self.size / self.shards

    @property
    def used(self) -> float:
        """Elements on one chip when it is used, of one layer."""
        return self.size / max(1, self.layers) / self.shards * self.gathered


@dataclass(frozen=True)
class _Side:
    """Inputs or outputs of a matrix: how many, and over how many chips they are split."""

    size: int
    ways: int
    embed: bool = False
    """Whether these are the axis that fsdp splits."""


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
        """Sequences on one chip, of those that are worked off at a time."""
        return self.config.trainer.batch_size // self.mesh.batch_shards // self.config.trainer.accumulate

    @property
    def length(self) -> int:
        """Tokens of each of these on one chip."""
        return self.config.trainer.seq_len // self.mesh.shape["sequence"]

    @property
    def tokens(self) -> int:
        """On one chip, of those that are worked off at a time."""
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
        """Logits of one chunk of the loss on one chip: its words, for the sequences of all chips that share the table."""
        return self.rows * self.mesh.shape["fsdp"] * self._own_words * self.chunk

    @property
    def chunk(self) -> int:
        """Positions of every sequence in one chunk of the loss."""
        return chunk_length(self.rows * self.mesh.shape["fsdp"], self.length, self._own_words)

    @property
    def _own_words(self) -> int:
        return self.variant.vocab // (self.mesh.shape["fsdp"] * self.mesh.shape["tensor"])

    @functools.cached_property
    def weights(self) -> list[Weight]:
        """Every kind of tensor, split as `launcher/training/mesh.py` splits it."""
        v, fsdp, tensor = self.variant, self.mesh.shape["fsdp"], self.mesh.shape["tensor"]
        frozen = bool(self.config.model.lora.rank)
        kept = {"trained": not frozen, "narrow": frozen}
        matrices = [
            Weight("embedding", v.vocab * v.d_model, 0, fsdp * tensor, 1, **kept),
            *(
                Weight(name, v.layers * rows.size * columns.size, v.layers, rows.ways * columns.ways, fsdp, **kept)
                for name, (rows, columns) in self._matrices.items()
            ),
        ]
        norms = v.parameters - sum(matrix.size for matrix in matrices)
        return [*matrices, Weight("norms", norms, v.layers, 1, 1, trained=not frozen, factored=False), *self._adapters]

    @property
    def _adapters(self) -> Iterator[Weight]:
        lora, layers, fsdp = self.config.model.lora, self.variant.layers, self.mesh.shape["fsdp"]
        for name in lora.targets if lora.rank else ():
            for side in self._matrices[name]:
                gathered = fsdp if side.embed else 1
                yield Weight(f"adapter of {name}", layers * side.size * lora.rank, layers, side.ways, gathered, factored=False)

    @property
    def _matrices(self) -> dict[str, tuple[_Side, _Side]]:
        """Inputs and outputs of every matrix of a layer, as it is called on the hub."""
        v, tensor = self.variant, self.mesh.shape["tensor"]
        embed = _Side(v.d_model, self.mesh.shape["fsdp"], embed=True)
        queries, mlp = _Side(v.heads * v.head_dim, tensor), _Side(v.d_ff, tensor)
        keys = _Side(v.kv_heads * v.head_dim, tensor if v.kv_heads % tensor == 0 else 1)
        return {
            "q_proj": (embed, queries),
            "k_proj": (embed, keys),
            "v_proj": (embed, keys),
            "o_proj": (queries, embed),
            "gate_proj": (embed, mlp),
            "up_proj": (embed, mlp),
            "down_proj": (mlp, embed),
        }


def libtpu_topology(kind: AcceleratorType) -> str:
    """How libtpu calls the slice: v5e:4x4."""
    return f"{kind.generation}:{kind.topology}"
