"""Hydra's hooks for a sweep (`-m`): the launcher that hands the points to launcher/sweep_task.py, and Hydra's own sweeper with its checks
left to that. Hydra imports this at every start, so it stays small.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class SweepLauncherConf:
    _target_: str = "hydra_plugins.podlaunch.sweep.SweepLauncher"
    max_concurrent: int | None = None


@dataclass
class PointSweeperConf(BasicSweeperConf):
    _target_: str = "hydra_plugins.podlaunch.sweep.PointSweeper"


class SweepLauncher(Launcher):
    """Every point is a run of its own."""

    def __init__(self, max_concurrent: int | None) -> None:
        self._max_concurrent = max_concurrent

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:  # noqa: ARG002
        from launcher.sweep_task import SweepTask

        self._task = SweepTask(hydra_context.config_loader, config, self._max_concurrent)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        return self._task.launch(job_overrides, initial_job_idx)


class PointSweeper(BasicSweeper):
    """All combinations of the values."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """The launcher composes all points before it starts one, and names the one that is wrong."""


ConfigStore.instance().store(group="hydra/launcher", name="podlaunch", node=SweepLauncherConf, provider="podlaunch")
ConfigStore.instance().store(group="hydra/sweeper", name="podlaunch", node=PointSweeperConf, provider="podlaunch")
