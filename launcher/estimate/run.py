"""The estimates of a whole run: its step on its slices."""

from dataclasses import dataclass

from cluster.errors import ConfigError
from launcher.config import LaunchConfig
from launcher.estimate.choose import explain_too_big
from launcher.estimate.memory import MemoryEstimate, estimate_memory, fits
from launcher.estimate.roofline import Roofline, estimate_time
from launcher.estimate.step import StepShape

ERROR = 0.15
"""How far off the estimate of memory is taken to be (docs/check-before-you-pay.md has what it was held against)."""


@dataclass(frozen=True)
class Estimate:
    step: StepShape
    memory: MemoryEstimate
    time: Roofline
    fits: bool


def estimate_of(config: LaunchConfig) -> Estimate:
    """Of job=train. Raises ConfigError when trainer.mesh=auto finds no mesh that fits."""
    training, slices = config.training_on_slices, config.slices
    step = StepShape(training, training.trainer.mesh)
    memory, time = estimate_memory(step), estimate_time(step, slices.accelerator, slices.usd_per_hour)
    return Estimate(step, memory, time, fits(memory.total, slices.accelerator.hbm_gib))


def check_memory(config: LaunchConfig) -> None:
    """Raises ConfigError, one line, for a step that cannot fit its chips, however far the estimate is off."""
    slices = config.slices
    if config.is_script or slices.cloud == "emulated":
        return
    estimate = estimate_of(config)
    if not fits(estimate.memory.total * (1 - ERROR), slices.accelerator.hbm_gib):
        raise ConfigError(explain_too_big(estimate.step, slices.accelerator, slices.slices))
