"""Bytes of a chip that a training step takes, by kind.

The kinds are what `compiled.memory_analysis()` weighs as arguments and temporaries, worked out from shapes. What lives at the same time is
decided by two moments, whichever is larger: the middle of the backward pass through the layers, and the loss.
"""

from dataclasses import asdict, dataclass

from launcher.estimate.step import StepShape

GIB = 2**30
MASTER = 4
"""Bytes of an element of weights, moments and gradients: float32."""
MOMENTS = 2
"""Of AdamW."""
PROGRAM = 30 * 2**20
"""Of gemma3-270m's step; a loop over layers makes it the same for larger models."""
HBM_FOR_PROGRAMS = 0.96
"""Of a chip's memory: the runtime keeps the rest (libtpu offers 30.75 of 32 GiB on v4, 15.75 of 16 on v5e, 31.25 of 32 on v6e)."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one chip. An estimate."""

    parameters: float
    optimizer: float
    batch: float
    gradients: float
    activations: float
    """What is kept for the backward pass, by `trainer.remat`."""
    layer: float
    """What one layer computes with while its gradients are worked out."""
    attention: float
    loss_chunk: float
    gathered_weights: float
    """Weights that are split over fsdp and whole while they are used, and the embedding's whole gradient."""
    program: float
    """The compiled code."""

    @property
    def total(self) -> float:
        return float(sum(asdict(self).values()))

    def by_kind(self) -> dict[str, float]:
        return asdict(self)


def estimate_memory(step: StepShape) -> MemoryEstimate:
    """Bytes on one chip."""
    held = sum(weight.held for weight in step.weights) * MASTER
    return MemoryEstimate(
        parameters=held,
        optimizer=MOMENTS * held,
        batch=5 * step.tokens * 4.0,
        gradients=held,
        activations=_kept(step),
        layer=_layer(step),
        attention=_attention(step),
        loss_chunk=2.0 * step.chunk_logits * 4,
        gathered_weights=_gathered(step),
        program=PROGRAM,
    )


def fits(needed: float, hbm_gib: float) -> bool:
    """Whether a program of so many bytes a chip fits such a chip."""
    return needed <= hbm_gib * GIB * HBM_FOR_PROGRAMS


def _kept(step: StepShape) -> float:
    """The input of every layer, and what the remat policy keeps of it beside."""
    v = step.variant
    tensor = step.mesh.shape["tensor"]
    each = float(v.d_model)
    if step.config.remat != "full":
        queries, keys = step.heads * v.head_dim, step.kv_heads * v.head_dim
        each += queries + 2 * keys + v.d_model + 2 * v.d_ff / tensor + v.d_model
        if step.config.remat == "none":
            each += 3 * v.d_ff / tensor + 2 * queries + 2 * keys + 6 * v.d_model
    kept = v.layers * step.tokens * each * step.element
    if step.config.remat == "none":
        kept += v.layers * _attention(step)
    return kept


def _layer(step: StepShape) -> float:
    v = step.variant
    wide = 4 * v.d_ff / step.mesh.shape["tensor"] + 4 * step.heads * v.head_dim + 4 * v.d_model
    return step.tokens * wide * step.element


def _attention(step: StepShape) -> float:
    if step.fused:  # the sums of the softmax rows, a vector register's width each
        return step.rows * step.heads * step.length * 128 * 4.0
    return 2.0 * step.rows * step.heads * step.length * step.config.trainer.seq_len * 4


def _gathered(step: StepShape) -> float:
    split = [weight for weight in step.weights if weight.gathered > 1]
    table = sum(weight.used for weight in split if not weight.layers)
    layer = sum(weight.used for weight in split if weight.layers)
    return table * (step.element + MASTER) + 2 * layer * step.element
