"""The record of a run: metrics.jsonl and TensorBoard files, written by process 0."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from launcher.perplexity import perplexity
from launcher.training.rows import Rows
from launcher.training.tensorboard import SummaryWriter
from launcher.training.tracking import Tracker


@dataclass(frozen=True)
class StepRecord:
    """One logged step."""

    step: int
    loss: float
    """Mean nats per learned token of this step's batch."""
    lr: float
    grad_norm: float
    """Before clipping."""
    update_norm: float
    """Of what was added to the weights."""
    tokens_per_second: float
    """All tokens of the global batch over `step_time`."""
    mfu: float | None
    """Model FLOP/s over the peak of all chips; None when the peak is unknown."""
    step_time: float
    """Seconds a step, mean since the last logged one."""


class MetricsWriter:
    """Appends to <output>/metrics.jsonl, one line a record, to <output>/tensorboard, and tells `tracker`."""

    def __init__(self, output: Path, attempt: int, tracker: Tracker | None = None) -> None:
        self._attempt, self._tracker = attempt, tracker
        self._rows = Rows(output / "metrics.jsonl")
        self._board = SummaryWriter(str(output / "tensorboard"))

    def step(self, record: StepRecord) -> None:
        values = asdict(record)
        self._rows.write({"step": values.pop("step"), "attempt": self._attempt, "time": time.time(), **values})
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(f"train/{name}", value, record.step)
        self._board.flush()
        if self._tracker is not None:
            self._tracker.log(record.step, {f"train/{name}": value for name, value in values.items()})

    def evaluation(self, step: int, loss: float, parts: Mapping[str, float]) -> None:
        """`loss`: mean nats per learned token of the held-out batches, after `step` steps; `parts`: the same of each part of a mixture, by
        name. Its row has no other measurement.
        """
        values = {"held_out_loss": loss, "held_out_perplexity": perplexity(loss)}
        by_part = {"held_out_parts": dict(parts)} if parts else {}
        self._rows.write({"step": step, "attempt": self._attempt, "time": time.time(), **values, **by_part})
        shown = {name.replace("_out_", "_out/"): value for name, value in values.items()}
        shown |= {f"held_out_parts/{name}": value for name, value in parts.items()}
        for name, value in shown.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()
        if self._tracker is not None:
            self._tracker.log(step, shown)

    def close(self) -> None:
        self._rows.close()
        self._board.close()
        if self._tracker is not None:
            self._tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
