"""What Weights & Biases is told of a run: by process 0, what metrics.jsonl holds.

The W&B run has the name of ours as its id, so that every attempt and every resume goes on with it. Its steps may go back after a rollback,
which W&B's own step must not, so ours is a value of its own and the axis of all others.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.config import WandbConfig
from launcher.training.reporter import Reporter

logger = logging.getLogger(__name__)


class Tracker:
    """Of one attempt. Whatever W&B lacks, training goes on: it is told once, by an event `wandb_failed {error}`."""

    def __init__(self, config: WandbConfig, run: str, settings: Mapping[str, Any], output: Path, reporter: Reporter) -> None:
        """`run`: its name. `settings`: what W&B shows of the configuration. `output`: W&B's files go to wandb/ in it."""
        self._reporter = reporter
        self._run: Any = None
        try:
            import wandb

            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                group=config.group,
                mode="offline" if config.mode == "offline" else "online",
                id=run,
                name=run,
                resume="allow",
                dir=str(output),
                config=dict(settings),
                settings=wandb.Settings(silent=True, console="off", x_disable_meta=True),
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # noqa: BLE001  # whatever the client lacks: a key, a network, its package
            self._give_up(error)

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """What is None is left out."""
        if self._run is None:
            return
        try:
            self._run.log({"step": step, **{name: value for name, value in values.items() if value is not None}})
        except Exception as error:  # noqa: BLE001  # its service may end at any time
            self._give_up(error)

    def close(self) -> None:
        """Send what is left."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:  # noqa: BLE001  # the same
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        self._run = None
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        logger.warning("Weights & Biases hears no more of this run: %s", text)
        self._reporter.emit("wandb_failed", error=text)
