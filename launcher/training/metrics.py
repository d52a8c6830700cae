"""The record of a run: metrics.jsonl and TensorBoard files, written by process 0."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tensorboardX import SummaryWriter


@dataclass(frozen=True)
class StepRecord:
    """One logged step."""

    step: int
    loss: float
    """Mean nats per learned token of this step's batch."""
    lr: float
    grad_norm: float
    """Before clipping."""
    tokens_per_second: float
    """All tokens of the global batch over `step_time`."""
    mfu: float | None
    """Model FLOP/s over the peak of all chips; None when the peak is unknown."""
    step_time: float
    """Seconds a step, mean since the last logged one."""


class MetricsWriter:
    """Appends to <output>/metrics.jsonl, one flushed line a record, and to <output>/tensorboard."""

    def __init__(self, output: Path, attempt: int) -> None:
        output.mkdir(parents=True, exist_ok=True)
        path = output / "metrics.jsonl"
        torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        self._attempt = attempt
        self._file = path.open("a", encoding="utf-8")
        if torn:  # the last attempt was killed inside a line: keep it from swallowing ours
            self._file.write("\n")
        self._board = SummaryWriter(str(output / "tensorboard"))

    def step(self, record: StepRecord) -> None:
        values = asdict(record)
        line = {"step": values.pop("step"), "attempt": self._attempt, "time": time.time(), **values}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(f"train/{name}", value, record.step)
        self._board.flush()

    def evaluation(self, step: int, loss: float) -> None:
        self._board.add_scalar("held_out/loss", loss, step)
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
