"""Between Hydra and a sweep: overrides become points, results become what sweepers understand."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from cluster.errors import PodlaunchError
from cluster.schema import at_least
from launcher.follow import EXIT_INTERRUPTED, EXIT_JOB_FAILED, table_console
from launcher.sweep import Detached, Sweep
from launcher.sweep_places import Place
from launcher.sweep_points import compose_points
from launcher.sweep_runs import ClusterRuns


class PointFailed(PodlaunchError):
    """A point of a sweep has ended without success."""

    exit_code = EXIT_JOB_FAILED


class SweepTask:
    """The sweep of one command."""

    def __init__(self, loader: ConfigLoader, config: DictConfig, max_concurrent: int | None) -> None:
        """`config`: what Hydra composed of the settings that the points share. Raises ConfigError."""
        if max_concurrent is not None:
            at_least("hydra.launcher.max_concurrent", max_concurrent, 1)
        self._loader, self._config = loader, config
        console = table_console()
        folder = Path(str(config.hydra.sweep.dir)).absolute()
        self._sweep = Sweep(console, ClusterRuns(console), folder, max_concurrent, shlex.join(sys.orig_argv))

    def launch(self, batch: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        """Returns when all have ended. `first`: the number of the first one, from 0. Raises ConfigError before any of them is started."""
        points = compose_points(self._loader, self._config, batch, first + 1)
        try:
            places = self._sweep.work_through(points)
        except Detached:
            raise SystemExit(EXIT_INTERRUPTED) from None
        return [_returned(place, overrides) for place, overrides in zip(places, batch, strict=True)]


def _returned(place: Place, overrides: Sequence[str]) -> JobReturn:
    """A sweeper that searches takes the loss."""
    returned = JobReturn(overrides=overrides, working_dir=place.run.url, task_name=place.point.run_id)
    if place.succeeded:
        returned.status, returned.return_value = JobStatus.COMPLETED, place.score
    else:
        error = f"point {place.point.number} of the sweep ({place.point.words}), run {place.point.run_id}: {place.failure}"
        returned.status, returned.return_value = JobStatus.FAILED, PointFailed(error)
    return returned
