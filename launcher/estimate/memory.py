"""Bytes of a chip that a training step takes, by kind.

The kinds are those of the compiler's plan of a chip's memory (launcher/training/compile_check.py), worked out from shapes. What lives at
the same time is decided by two moments, whichever is larger: the backward pass of a layer, when all gradients are there, and that of a
chunk of the loss, when of the gradients only the head's is, twice where replicas sum it up. What is not there at that moment counts 0. (A
gradient of the head that fits a chip's vector memory may be there instead; that is left out of account.)

How many arrays of a layer's width and how many layers' gathered weights live at a time, the compiler's schedule decides: `WORK` and
`GATHERED` are fitted to its plans for Gemma 3 of all sizes on v6e, v5e and v5p (docs/tpu-compiler.md).
"""

from dataclasses import asdict, dataclass

from launcher.estimate.step import StepShape, Weight

GIB = 2**30
MASTER = 4
"""Bytes of an element of trained weights, moments and gradients: float32."""
MOMENTS = {"adamw": 2, "sgd": 1}
"""Of the size of the weights. Adafactor keeps one for what it does not factor, and next to nothing for the rest."""
PROGRAM = 30 * 2**20
"""Of gemma3-270m's step; a loop over layers makes it the same for larger models."""
WORK = 5
"""Arrays of each width of a layer (d_ff, heads, d_model) that live while its gradients are worked out."""
GATHERED = 1
"""Layers whose gathered weights live at a time."""
TURNED = ("q_proj", "k_proj", "v_proj")
"""Matrices that the compiler lays out anew, all layers at once, before the loop over layers: trained ones when it casts them, frozen ones,
which are there in the right type, in copies."""
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
    """Weights in the type that is computed in: all that a chip holds, cast or laid out anew before the loop over layers, and those of the
    layer at work, gathered over fsdp.
    """
    program: float
    """The compiled code."""

    @property
    def total(self) -> float:
        return float(sum(asdict(self).values()))

    def by_kind(self) -> dict[str, float]:
        return asdict(self)


def estimate_memory(step: StepShape) -> MemoryEstimate:
    """Bytes on one chip."""
    trained = [weight for weight in step.weights if weight.trained]
    gradients = sum(weight.held for weight in trained) * MASTER
    head = sum(weight.held for weight in trained if not weight.layers)
    cast = _cast(step)
    layers = {"gradients": gradients, "layer": _layer(step), "attention": _attention(step), "gathered_weights": cast + _gathered(step)}
    narrow = head * step.element if step.element != MASTER else 0.0
    loss = {"gradients": 2 * head * MASTER, "loss_chunk": step.chunk_logits * 4.0, "gathered_weights": cast + narrow}
    sums = gradients if step.config.trainer.accumulate > 1 else 0.0
    moment = max(layers, loss, key=lambda kinds: sum(kinds.values()))
    moment["gradients"] += sums
    return MemoryEstimate(
        **dict.fromkeys(("layer", "attention", "gathered_weights", "loss_chunk"), 0.0) | moment,
        parameters=sum(weight.held * (step.element if weight.narrow else MASTER) for weight in step.weights),
        optimizer=sum(_moments(weight, step.config.trainer.optimizer) for weight in trained) * MASTER,
        batch=5 * step.tokens * step.config.trainer.accumulate * 4.0,
        activations=_kept(step),
        program=PROGRAM,
    )


def fits(needed: float, hbm_gib: float) -> bool:
    """Whether a program of so many bytes a chip fits such a chip."""
    return needed <= hbm_gib * GIB * HBM_FOR_PROGRAMS


def _moments(weight: Weight, optimizer: str) -> float:
    """Elements on one chip that the optimizer remembers of `weight`."""
    if optimizer == "adafactor":
        return 0.0 if weight.factored else weight.held
    return MOMENTS[optimizer] * weight.held


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
    return WORK * step.tokens * (v.d_ff / step.mesh.shape["tensor"] + step.heads * v.head_dim + v.d_model) * step.element


def _attention(step: StepShape) -> float:
    if step.fused:  # the sums of the softmax rows, a vector register's width each
        return step.rows * step.heads * step.length * 128 * 4.0
    return 2.0 * step.rows * step.heads * step.length * step.config.trainer.seq_len * 4


def _cast(step: StepShape) -> float:
    """What is made of the weights of all layers before the loop over them."""
    if step.element == MASTER:
        return 0.0
    layered = [weight for weight in step.weights if weight.layers]
    return step.element * sum(weight.held for weight in layered if weight.trained or weight.name in TURNED)


def _gathered(step: StepShape) -> float:
    return GATHERED * step.element * sum(weight.used for weight in step.weights if weight.layers and weight.gathered > 1)
