"""The training loop: one step after another until the last, or until the run is told to stop."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax

from cluster.errors import PodlaunchError
from launcher.config import TrainingConfig
from launcher.data.batches import TrainBatches
from launcher.training.checkpoint import Checkpoints
from launcher.training.mesh import Layout
from launcher.training.metrics import MetricsWriter, StepRecord
from launcher.training.preemption import StopSignal
from launcher.training.profiling import Profiler
from launcher.training.reporter import Reporter, StepThrottle
from launcher.training.saving import Saving
from launcher.training.stall import Stall, StepClock
from launcher.training.state import TrainState
from launcher.training.step import CompiledSteps, StepMetrics, put_batch

CHECKED_BEHIND = 2
"""So many steps after it was started a step's loss is looked at: late enough that the device never waits for the host."""

PLACES_TOLD = 64


class Preempted(Exception):
    """The run was told to stop; its state is saved at `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step}, state saved")
        self.step = step


class NonFinite(PodlaunchError):
    """The loss or the gradient of a step is no finite number."""


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
    saving: Saving
    evaluate: Callable[[int], object]
    """Called with the steps that are done, when trainer.eval_every says so; every process calls it."""
    reporter: Reporter
    profiler: Profiler
    peak_flops: float | None
    """Sum over all chips, FLOP/s."""
    _throttle: StepThrottle = field(init=False)
    _marked: tuple[int, float] = field(init=False)
    """The last logged step and when it was done."""
    _unchecked: deque[tuple[int, StepMetrics]] = field(init=False, default_factory=deque)
    """Steps whose loss nobody has looked at."""

    def __post_init__(self) -> None:
        self._throttle = StepThrottle(self.config.trainer.steps)
        # XLA's CPU collectives deadlock when several steps are under way at once: wait for every step there
        self._wait_each = jax.default_backend() == "cpu"

    def run(self, first: int) -> float | None:
        """Steps first + 1 to `trainer.steps`; the loss of the last logged one. Raises Preempted, NonFinite, CheckpointError."""
        self._marked = (first, time.monotonic())
        steps = StepClock(None if self._wait_each else jax.block_until_ready)
        try:
            return self._steps(first, Stall(steps), steps)
        finally:
            steps.close()
            self.profiler.finish()

    def _steps(self, first: int, stall: Stall, steps: StepClock) -> float | None:
        ready, trainer = self.ready, self.config.trainer
        loss: float | None = None
        for step in range(first + 1, trainer.steps + 1):
            if ready.stop.reached(step):
                self._check(up_to=step - 1)
                self._stop(step - 1)
            self.profiler.before(step, self._settle)
            batch = put_batch(self.batches, step - 1, ready.layout)
            stall.dispatching()
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                ready.state, metrics = ready.steps.train(ready.state, batch)
            steps.dispatched(metrics)
            if self._wait_each:
                jax.block_until_ready((ready.state, metrics))  # type: ignore[no-untyped-call]  # JAX's
                steps.done()
            save = self.saving.due(step) and step < trainer.steps
            evaluate = trainer.eval_every is not None and step % trainer.eval_every == 0 and step < trainer.steps
            interrupted = save or evaluate
            self._unchecked.append((step, metrics))
            self._check(up_to=step if interrupted or self._wait_each or self._is_logged(step) else step - CHECKED_BEHIND)
            record = self._record(step, metrics) if self._is_logged(step) else None
            loss = record.loss if record else loss
            self._report(step, record, stall.seconds, told=interrupted)
            if save:
                self.reporter.emit("phase", phase="saving")
                ready.checkpoints.save(step, ready.state)
            if evaluate:
                self.evaluate(step)
            if interrupted:
                self.reporter.emit("phase", phase="training")
                stall.resume()
            ready.checkpoints.poll()
        return loss

    def _settle(self) -> None:
        """Returns when every step that was dispatched is done."""
        jax.block_until_ready(self.ready.state)  # type: ignore[no-untyped-call]  # JAX's

    def _check(self, up_to: int) -> None:
        """Raises NonFinite for the first step that has no finite loss, gradient or update, on all processes alike; waits for these steps.

        Every save is preceded by the check of all its steps: no checkpoint holds what such a step left.
        """
        while self._unchecked and self._unchecked[0][0] <= up_to:
            step, metrics = self._unchecked.popleft()
            for name in ("loss", "grad_norm", "update_norm"):
                value = float(getattr(metrics, name))
                if not math.isfinite(value):
                    self.ready.checkpoints.wait()  # of an earlier step, and as good as any
                    raise NonFinite(self._describe(step, name, value))

    def _describe(self, step: int, name: str, value: float) -> str:
        good = self.ready.checkpoints.newest
        places = self.batches.places(step - 1)
        told = "; ".join(places[:PLACES_TOLD]) + ("; ..." if len(places) > PLACES_TOLD else "")
        kept = "no checkpoint was made yet" if good is None else f"checkpoint {good} is from before it"
        return (
            f"{name} is {value} at step {step}, training stopped; the documents of its batch begin at {told}; {kept}; "
            "lower trainer.lr or trainer.max_grad_norm, or mend these, then go on with run.resume=true run.allow=[optimizer,data]"
        )

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
        flops = rate * self.config.flops_per_token
        return StepRecord(
            step=step,
            loss=loss,
            lr=float(metrics.lr),
            grad_norm=grad_norm,
            update_norm=float(metrics.update_norm),
            tokens_per_second=rate,
            mfu=flops / self.peak_flops if self.peak_flops else None,
            step_time=step_time,
        )

    def _report(self, step: int, record: StepRecord | None, stall_s: float, *, told: bool) -> None:
        """`told`: whatever the throttle says, since another phase begins."""
        if record and self.ready.metrics:
            self.ready.metrics.step(record)
        if self._throttle.passes(step, record is not None or told):
            values: dict[str, Any] = dict.fromkeys(("loss", "tokens_per_second", "mfu", "step_time"))
            if record:
                values = {name: getattr(record, name) for name in values}
            self.reporter.emit("step", step=step, total_steps=self.config.trainer.steps, stall_s=round(stall_s, 4), **values)

    def _stop(self, step: int) -> None:
        """Save at this boundary and leave."""
        self.reporter.emit("phase", phase="saving")
        self.ready.checkpoints.save(step, self.ready.state)
        self.ready.checkpoints.wait()
        raise Preempted(step)
