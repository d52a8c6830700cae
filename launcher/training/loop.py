"""The training loop: one step after another until the last, or until the run is told to stop."""

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax

from launcher.config import TrainingConfig
from launcher.data.batches import TrainBatches
from launcher.training.checkpoint import Checkpoints
from launcher.training.mesh import Layout
from launcher.training.metrics import MetricsWriter, StepRecord
from launcher.training.preemption import StopSignal
from launcher.training.reporter import Reporter, StepThrottle
from launcher.training.state import TrainState
from launcher.training.step import CompiledSteps, StepMetrics, put_batch


class Preempted(Exception):
    """The run was told to stop; its state is saved at `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step}, state saved")
        self.step = step


class LoopState(Protocol):
    """What the loop works with; it moves `state` on."""

    layout: Layout
    steps: CompiledSteps
    checkpoints: Checkpoints
    metrics: MetricsWriter | None
    stop: StopSignal
    state: TrainState


@dataclass
class Loop:
    """Runs the steps that are left."""

    config: TrainingConfig
    batches: TrainBatches
    ready: LoopState
    reporter: Reporter
    peak_flops: float | None
    """Sum over all chips, FLOP/s."""
    _throttle: StepThrottle = field(init=False)
    _marked: tuple[int, float] = field(init=False)
    """The last logged step and when it was done."""

    def __post_init__(self) -> None:
        self._throttle = StepThrottle(self.config.trainer.steps)
        # XLA's CPU collectives deadlock when several steps are under way at once: wait for every step there
        self._wait_each = jax.default_backend() == "cpu"

    def run(self, first: int) -> float | None:
        """Steps first + 1 to `trainer.steps`; the loss of the last logged one. Raises Preempted."""
        ready, trainer = self.ready, self.config.trainer
        loss: float | None = None
        self._marked = (first, time.monotonic())
        for step in range(first + 1, trainer.steps + 1):
            if ready.stop.reached(step):
                self._stop(step - 1)
            ready.state, metrics = ready.steps.train(ready.state, put_batch(self.batches, step - 1, ready.layout))
            if self._wait_each:
                jax.block_until_ready((ready.state, metrics))  # type: ignore[no-untyped-call]  # JAX's
            record = self._record(step, metrics) if self._is_logged(step) else None
            loss = record.loss if record else loss
            self._report(step, record)
            if step % trainer.checkpoint_every == 0 and step < trainer.steps:
                ready.checkpoints.save(step, ready.state)
            ready.checkpoints.poll()
        return loss

    def _is_logged(self, step: int) -> bool:
        trainer = self.config.trainer
        return step in (1, trainer.steps) or step % trainer.log_every == 0

    def _record(self, step: int, metrics: StepMetrics) -> StepRecord:
        """Fetch the metrics, which waits for the step, and work out the rates since the last logged step."""
        loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
        now = time.monotonic()
        step_time = (now - self._marked[1]) / (step - self._marked[0])
        self._marked = (step, now)
        trainer = self.config.trainer
        rate = trainer.batch_size * trainer.seq_len / step_time
        flops = rate * self.config.model.shape.flops_per_token(trainer.seq_len)
        return StepRecord(
            step=step,
            loss=loss,
            lr=float(metrics.lr),
            grad_norm=grad_norm,
            tokens_per_second=rate,
            mfu=flops / self.peak_flops if self.peak_flops else None,
            step_time=step_time,
        )

    def _report(self, step: int, record: StepRecord | None) -> None:
        if record and self.ready.metrics:
            self.ready.metrics.step(record)
        if self._throttle.passes(step, record is not None):
            values: dict[str, Any] = dict.fromkeys(("loss", "tokens_per_second", "mfu"))
            if record:
                values = {name: getattr(record, name) for name in values}
            self.reporter.emit("step", step=step, total_steps=self.config.trainer.steps, **values)

    def _stop(self, step: int) -> None:
        """Save at this boundary and leave."""
        self.reporter.emit("phase", phase="saving")
        self.ready.checkpoints.save(step, self.ready.state)
        self.ready.checkpoints.wait()
        raise Preempted(step)
