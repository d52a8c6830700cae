"""`trainer.mesh=auto`: which mesh a step takes on its slices, and what would help where none fits."""

import dataclasses
import itertools
from collections.abc import Iterator

from cluster.errors import ConfigError
from cluster.tpu.catalog import AcceleratorType, all_types
from launcher.config import TrainingConfig
from launcher.estimate.memory import GIB, HBM_FOR_PROGRAMS, MemoryEstimate, estimate_memory, fits
from launcher.estimate.roofline import estimate_time
from launcher.estimate.step import StepShape
from launcher.mesh import MeshConfig

IDLE_SHARE = 0.1
"""Of what a step does while it waits for something slower: no overlap is perfect, and of two meshes with the same bound that one wins
which does less beside it."""


def choose_mesh(config: TrainingConfig, kind: AcceleratorType, slices: int) -> MeshConfig:
    """The fastest mesh by the estimate among those that fit and leave what the user gave as it is, resolved.

    Raises ConfigError, one line, when none fits (what, how much of how much, what would), or none divides model and batch.
    """
    possible = list(_possible(config, kind, slices))
    if not possible:
        config.check_devices(kind.chips * slices, slices)  # says why
        raise ConfigError(
            f"trainer.mesh: no mesh of {kind.chips} chips divides {config.model.variant} with trainer.batch_size "
            f"{config.trainer.batch_size}; a batch that is a multiple of {kind.chips * slices} can always be split"
        )
    fitting = [step for step in possible if fits(estimate_memory(step).total, kind.hbm_gib)]
    if not fitting:
        raise ConfigError(explain_too_big(min(possible, key=lambda step: estimate_memory(step).total), kind, slices))
    return min(fitting, key=lambda step: _cost(step, kind)).mesh


def explain_too_big(step: StepShape, kind: AcceleratorType, slices: int) -> str:
    """One line: what does not fit, by how much, and what would."""
    config, estimate = step.config, estimate_memory(step)
    largest = max(estimate.by_kind().items(), key=lambda item: item[1])
    remedies = "; ".join(_remedies(step, kind, slices)) or "take a smaller model"
    return (
        f"{config.model.variant} with trainer.batch_size={config.trainer.batch_size} and trainer.seq_len={config.trainer.seq_len} needs "
        f"about {estimate.total / GIB:.1f} GiB a chip on {kind.name} ({kind.topology}, mesh {step.mesh.describe()}) of "
        f"{kind.hbm_gib * HBM_FOR_PROGRAMS:.1f} GiB, most of it {largest[0].replace('_', ' ')} ({largest[1] / GIB:.1f} GiB); "
        f"by the same estimate this would fit: {remedies}"
    )


def memory_of(config: TrainingConfig, mesh: MeshConfig) -> MemoryEstimate:
    return estimate_memory(StepShape(config, mesh))


def _possible(config: TrainingConfig, kind: AcceleratorType, slices: int) -> Iterator[StepShape]:
    shape = config.model.shape
    for sizes in _factors(kind.chips):
        if shape.heads % sizes["tensor"] or shape.d_model % sizes["fsdp"]:
            continue
        given = config.trainer.mesh
        asked = {axis: getattr(given, axis) for axis in sizes}
        if any(size not in (None, -1, sizes[axis]) for axis, size in asked.items()):
            continue
        mesh = MeshConfig(**sizes, slices=slices)
        fixed = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, mesh=mesh))
        try:
            fixed.check_devices(kind.chips * slices, slices)
        except ConfigError:
            continue
        step = StepShape(fixed, mesh)
        if asked["sequence"] is None and mesh.sequence != 1 and not step.fused:
            continue  # without the fused kernel all keys are on every chip, and nothing is won
        yield step


def _factors(chips: int) -> Iterator[dict[str, int]]:
    """Every way to write the number of chips as a product of the four axes."""
    divisors = [d for d in range(1, chips + 1) if chips % d == 0]
    for fsdp, sequence, tensor in itertools.product(divisors, repeat=3):
        data, rest = divmod(chips, fsdp * sequence * tensor)
        if data and not rest:
            yield {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}


def _cost(step: StepShape, kind: AcceleratorType) -> tuple[float, int, int]:
    time = estimate_time(step, kind)
    every = (time.compute_s, time.hbm_s, time.ici_s, time.dcn_s)
    mesh = step.mesh.shape
    return time.step_s + IDLE_SHARE * (sum(every) - time.step_s), mesh["tensor"] * mesh["sequence"], mesh["data"]


def _remedies(step: StepShape, kind: AcceleratorType, slices: int) -> Iterator[str]:
    config = step.config
    if config.remat != "full" and _fits_with(config, kind, slices, remat="full"):
        yield "trainer.remat=full"
    if config.trainer.mesh.is_open is False and (better := _best(config, kind, slices)):
        yield f"trainer.mesh=auto ({better.describe()})"
    batch = config.trainer.batch_size
    smaller = (batch // 2**i for i in range(1, 20) if batch % 2**i == 0)
    if (size := next((size for size in smaller if _fits_with(config, kind, slices, batch_size=size)), None)) is not None:
        yield f"trainer.batch_size={size}"
    larger = (other for other in all_types() if other.generation == kind.generation and other.chips > kind.chips)
    if (other := next((other for other in larger if _best(config, other, slices)), None)) is not None:
        yield f"cluster.accelerator_type={other.name}"


def _fits_with(config: TrainingConfig, kind: AcceleratorType, slices: int, **trainer: object) -> bool:
    changed = dataclasses.replace(config.trainer, **trainer)  # type: ignore[arg-type]  # fields of it
    return _best(dataclasses.replace(config, trainer=changed), kind, slices) is not None


def _best(config: TrainingConfig, kind: AcceleratorType, slices: int) -> MeshConfig | None:
    """The mesh that would be chosen, whatever the user gave; None when none fits."""
    free = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, mesh=MeshConfig()))
    fitting = [step for step in _possible(free, kind, slices) if fits(estimate_memory(step).total, kind.hbm_gib)]
    return min(fitting, key=lambda step: _cost(step, kind)).mesh if fitting else None
