"""How fast a training step can be at best: what it computes and moves, against the peaks of the chips. Estimates, not measurements.

A step takes at least as long as the slowest of four things that chips do at the same time: multiply, read and write their memory, talk to
the chips of their slice, and to the other slices. What a real step adds (waiting, small operations, imperfect overlap) is not in it:
published trainings on these chips reach 40 to 70 % of the peak.
"""

from dataclasses import dataclass

from cluster.tpu.catalog import AcceleratorType
from launcher.estimate.memory import MASTER
from launcher.estimate.step import StepShape

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Roofline:
    """Of one step. Bytes and operations are of one chip; every figure is an estimate."""

    model_flops: float
    """What the model needs: `Variant.flops_per_token`."""
    hardware_flops: float
    """With what is computed again in the backward pass."""
    hbm_bytes: float
    ici_bytes: float
    """That a chip takes in from its slice."""
    dcn_bytes: float
    """That a chip takes in from other slices."""
    compute_s: float
    hbm_s: float
    ici_s: float
    dcn_s: float
    global_tokens: int
    peak_flops: float
    """A chip's."""
    usd_per_hour: float | None
    """Of all slices together."""

    @property
    def step_s(self) -> float:
        """At least so many seconds."""
        return max(self.compute_s, self.hbm_s, self.ici_s, self.dcn_s)

    @property
    def bound(self) -> str:
        """What a step waits for: compute, HBM, ICI or DCN."""
        times = {"compute": self.compute_s, "HBM": self.hbm_s, "ICI": self.ici_s, "DCN": self.dcn_s}
        return max(times, key=lambda name: times[name])

    @property
    def tokens_per_second(self) -> float:
        """At most, over all chips."""
        return self.global_tokens / self.step_s

    @property
    def mfu(self) -> float:
        """At most: model FLOPs against the peak."""
        return self.model_flops / self.step_s / self.peak_flops

    @property
    def usd_per_billion_tokens(self) -> float | None:
        """At least, at the catalogue's list price."""
        return None if self.usd_per_hour is None else self.usd_per_hour / 3600 / self.tokens_per_second * GIGA


def estimate_time(step: StepShape, kind: AcceleratorType, usd_per_hour: float | None = None) -> Roofline:
    """The roofline of `step` on slices of `kind` that cost `usd_per_hour` together."""
    chip_tokens = step.global_tokens / step.chips
    model = step.config.flops_per_token * chip_tokens
    head = 2.0 * step.variant.vocab * step.variant.d_model * chip_tokens
    forward = step.variant.flops_per_token(step.config.trainer.seq_len) * chip_tokens / 3
    again = forward - head if step.config.remat == "full" else 0.0  # the loss is worked out with its gradients
    hbm, ici, dcn = _hbm_bytes(step), _ici_bytes(step), _dcn_bytes(step)
    dcn_rate = kind.dcn_gb_per_s
    return Roofline(
        model_flops=model,
        hardware_flops=model + again,
        hbm_bytes=hbm,
        ici_bytes=ici,
        dcn_bytes=dcn,
        compute_s=(model + again) / (kind.peak_bf16_tflops * TERA),
        hbm_s=hbm / (kind.hbm_gb_per_s * GIGA),
        ici_s=ici / (kind.ici_gb_per_s * GIGA * _wrap(kind)),
        dcn_s=dcn / (dcn_rate * GIGA) if dcn_rate else 0.0,
        global_tokens=step.global_tokens,
        peak_flops=kind.peak_bf16_tflops * TERA,
        usd_per_hour=usd_per_hour,
    )


def _wrap(kind: AcceleratorType) -> float:
    """The share of its links that a chip of a small slice can use: without links around the edges a ring goes there and back.

    v5e and v6e close a ring from 16 chips along an axis on, v4 and v5p from 4 (Google's pages of these); v2 and v3 as their pods do.
    """
    needed = {"v4": 4, "v5p": 4}.get(kind.generation, 16)
    axes = [int(axis) for axis in kind.topology.split("x")]
    return 1.0 if min(axes) >= needed else 0.5


def _hbm_bytes(step: StepShape) -> float:
    """Weights where they are used and in the optimizer, activations of every layer written and read, and the logits."""
    v, tensor, parts = step.variant, step.mesh.shape["tensor"], step.config.trainer.accumulate
    used = sum(weight.used * max(1, weight.layers) for weight in step.weights)
    trained = [weight for weight in step.weights if weight.trained]
    passes = 4 if step.config.remat == "full" else 3
    per_token = 8 * v.d_model + 6 * v.d_ff / tensor + 4 * (step.heads + step.kv_heads) * v.head_dim
    activations = v.layers * step.tokens * per_token * step.element * passes
    logits = step.tokens * v.vocab / tensor * 3 * (4 + step.element)  # in float32, and their gradient in the type that is computed in
    # The gradient of the head is read and written at every chunk of the loss
    head = sum(weight.held for weight in trained if not weight.layers) * 2 * MASTER * step.length / step.chunk
    optimizer = sum(weight.held for weight in trained) * MASTER * 8  # read the gradient twice, weights and moments; write these
    return parts * (used * step.element * passes + activations + logits + head) + optimizer


def _ici_bytes(step: StepShape) -> float:
    """That a chip takes in: gathers of weights, sums of gradients and activations, hidden states where the vocabulary is split, keys and
    values of a split sequence.
    """
    v, mesh, parts = step.variant, step.mesh.shape, step.config.trainer.accumulate
    data, fsdp, tensor, sequence = (mesh[axis] for axis in ("data", "fsdp", "tensor", "sequence"))
    gathered = [weight for weight in step.weights if weight.gathered > 1]
    used = sum(weight.used * max(1, weight.layers) for weight in gathered)
    gathers = 2 * used * step.element * (fsdp - 1) / fsdp
    scattered = sum(weight.used * max(1, weight.layers) for weight in gathered if weight.trained) * MASTER * (fsdp - 1) / fsdp
    summed = 2 * _trained(step) * (data * sequence - 1) / (data * sequence)
    passes = 3 if step.config.remat == "full" else 2
    hidden = step.tokens * v.d_model * step.element
    layer_sums = 2 * passes * 2 * hidden * (tensor - 1) / tensor
    keys = 2 * step.tokens * sequence * step.kv_heads * v.head_dim * step.element * passes * (sequence - 1) / sequence
    words = 4 * hidden * (fsdp - 1) + 2 * hidden * (tensor - 1) / tensor  # rows and losses, forwards and backwards
    return parts * (gathers + scattered + words + v.layers * (layer_sums + keys)) + summed


def _dcn_bytes(step: StepShape) -> float:
    slices = step.mesh.shape["slice"]
    return 2 * _trained(step) * (slices - 1) / slices


def _trained(step: StepShape) -> float:
    """Bytes of the gradients on one chip."""
    return sum(weight.held for weight in step.weights if weight.trained) * MASTER
