"""A training job: prepare, execute, clean up. One per process; all processes of a run make the same calls.

    TrainingJob(TrainingConfig.from_yaml("x.yaml"), Path("out")).run()      # one process, no Ray, no cluster

What it leaves in `output`: metrics.jsonl, samples.jsonl, tensorboard/, checkpoints/<step>/, and export/ when it came to its end.
"""

import contextlib
import math
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from launcher.config import TrainingConfig
from launcher.curve import meaning_of
from launcher.data.batches import EvalBatches, TrainBatches
from launcher.data.cache import PackedData, open_packed
from launcher.data.tokenizer import Tokenizer
from launcher.models import lora
from launcher.models.interface import Params
from launcher.runs import SAMPLES, RunDirectory
from launcher.training.checkpoint import FOLDER, Checkpoints
from launcher.training.export import export_adapters, export_model
from launcher.training.held_out import measure
from launcher.training.history import history_of
from launcher.training.loading import load_params
from launcher.training.loop import Loop, NonFinite, Preempted
from launcher.training.mesh import Layout, make_layout
from launcher.training.metrics import MetricsWriter
from launcher.training.optimizer import make_optimizer
from launcher.training.preemption import StopSignal
from launcher.training.processes import check_same, from_main, is_main
from launcher.training.profiling import profiler_of
from launcher.training.reporter import Reporter, SilentReporter
from launcher.training.retention import Retention
from launcher.training.rows import Rows
from launcher.training.samples import Sampler
from launcher.training.saving import History, make_saving, parse_every
from launcher.training.state import Blueprint, TrainState, make_blueprint
from launcher.training.step import CompiledSteps, compile_steps, put_batch
from launcher.training.tracking import Tracker
from launcher.weights.check import check_weights
from launcher.weights.folder import ModelFolder
from launcher.weights.tokenizer import tokenizer_of

__all__ = ["NonFinite", "Preempted", "TrainingJob", "TrainingResult"]


@dataclass(frozen=True)
class TrainingResult:
    """How a job ended. Losses are mean nats per learned token."""

    step: int
    loss: float | None
    """Of the last step's batch; None when a resumed job had no step left to do."""
    held_out_before: float | None
    """None when the job did not start at step 0."""
    held_out_after: float
    export: Path


class TrainingJob:
    """Trains what `config` says into the folder `output`; goes on from the newest good checkpoint there.

    `peak_flops` is the sum over all chips of the run, in FLOP/s; without it no MFU is reported. `allow` names what a resume may find
    changed (`run.allow`). `checkpoints`: where they are instead of in `output`, a local path or gs://. Other exceptions than those named at
    the methods are bugs or JAX's own (out of memory, a lost peer).
    """

    def __init__(
        self,
        config: TrainingConfig,
        output: Path,
        reporter: Reporter | None = None,
        *,
        attempt: int = 0,
        peak_flops: float | None = None,
        allow: Collection[str] = (),
        may_publish: Callable[[], None] = lambda: None,
        checkpoints: str | None = None,
        name: str | None = None,
    ) -> None:
        """`name`: of the run; by default that of the folder. `may_publish` is called on process 0 before anything is published that
        outlives the attempt; it raises where that must not be.
        """
        self.config, self.output, self.attempt = config, output, attempt
        self.peak_flops, self.allow, self.may_publish = peak_flops, allow, may_publish
        self.name = name or output.name
        self.checkpoints = checkpoints or str(output / FOLDER)
        self.reporter = reporter or SilentReporter()
        self._open = contextlib.ExitStack()
        self._ready: _Prepared | None = None

    def run(self) -> TrainingResult:
        """Prepare, execute, clean up. Raises what these raise."""
        try:
            self.prepare()
            return self.execute()
        finally:
            self.cleanup()

    def prepare(self) -> None:
        """Mesh, data, compiled steps, and a state that is new or restored.

        Raises ConfigError (mesh, data or weights do not fit, or a resume finds other settings), CheckpointError (none usable),
        PodlaunchError (hosts disagree about the data).
        """
        layout = make_layout(self.config.check_devices(len(jax.devices())))
        stop = StopSignal()
        self._open.callback(stop.disarm)
        self._phase("data")
        weights = check_weights(self.config.model)
        tokenizer = tokenizer_of(self.config.data, weights)
        data = self._open_data(tokenizer)
        self._phase("compiling")
        blueprint = make_blueprint(self.config, layout, make_optimizer(self.config))
        steps = compile_steps(blueprint)
        samples = self.config.trainer.samples
        sampler = Sampler(blueprint, tokenizer, samples) if samples.prompts else None
        self._phase("restoring")
        checkpoints = self._open.enter_context(contextlib.closing(self._checkpoints(data, weights)))
        state = checkpoints.restore(blueprint.abstract)
        if state is None or blueprint.frozen:
            self._phase("initializing")
        frozen = self._load(weights, blueprint, blueprint.frozen) if weights and blueprint.frozen else {}
        if state is None:
            begun = self._load(weights, blueprint, blueprint.abstract.params) if weights and not frozen else None
            state = blueprint.init(begun)
        metrics = self._open.enter_context(MetricsWriter(self.output, self.attempt, self._tracker())) if is_main() else None
        steps = steps.with_frozen(frozen)
        self._ready = _Prepared(layout, weights, tokenizer, data, steps, sampler, blueprint, checkpoints, metrics, stop, state, frozen)

    def execute(self) -> TrainingResult:
        """Evaluate, train, evaluate, save, export. Raises Preempted after SIGTERM, with the state saved at a step boundary;
        NonFinite when a step's loss is none; CheckpointError when a save failed.
        """
        ready, trainer = self._prepared(), self.config.trainer
        first = int(ready.state.step)
        before = None
        if first == 0:
            before = self._evaluate("before", first)
            self._write_samples("before", first)
        self._phase("training")
        loss = self._loop(ready, first).run(first)
        self._phase("saving")
        ready.checkpoints.save(int(ready.state.step), ready.state)
        after = self._evaluate("after", int(ready.state.step))
        self._write_samples("after", int(ready.state.step))
        self._phase("saving")
        ready.checkpoints.wait()
        self._phase("exporting")
        if is_main():
            self.may_publish()
        export = self._export(ready)
        self.reporter.emit("finished", step=trainer.steps, loss=loss)
        return TrainingResult(trainer.steps, loss, before, after, export)

    def ask_to_stop(self) -> bool:
        """End at the next step boundary with the state saved, as after SIGTERM; one process only. False when there is no state yet."""
        if self._ready is None:
            return False
        self._ready.stop.ask()
        return True

    def cleanup(self) -> None:
        """Finish a save that is under way, close files and threads. Always call it; may be called again."""
        self._ready = None
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cleanup()

    def _prepared(self) -> "_Prepared":
        if self._ready is None:
            raise RuntimeError("call prepare() before execute()")
        return self._ready

    def _load(self, weights: ModelFolder, blueprint: Blueprint, abstract: Params) -> Params:
        check_same("the content of model.weights", weights.fingerprint)
        began, before = time.monotonic(), weights.bytes_read
        params = load_params(weights, self.config.model, blueprint.layout, abstract)
        self.reporter.emit("weights_loaded", bytes=weights.bytes_read - before, seconds=round(time.monotonic() - began, 3))
        return params

    def _export(self, ready: "_Prepared") -> Path:
        loaded = ready.weights.config if ready.weights else None
        params, folder = lora.join(ready.state.params, ready.frozen), self.output / "export"
        if ready.frozen and not self.config.model.lora.merge:
            return export_adapters(params, self.config, ready.tokenizer, folder, ready.layout)
        return export_model(params, self.config, ready.tokenizer, folder, ready.layout, loaded)

    def _open_data(self, tokenizer: Tokenizer) -> PackedData:
        data = open_packed(self.config.data, tokenizer, self.config.trainer.seq_len)
        check_same("the training data", data.key)
        self.reporter.emit("data", parts=data.about["parts"], held_out=data.about["held_out"])
        return data

    def _checkpoints(self, data: PackedData, weights: ModelFolder | None) -> Checkpoints:
        trainer = self.config.trainer
        retention = Retention(trainer.keep_checkpoints, trainer.keep_every)
        meaning = meaning_of(self.config, data.key, weights.fingerprint if weights else None)
        return Checkpoints(self.checkpoints, retention, self.reporter, meaning=meaning, allow=self.allow, may_publish=self.may_publish)

    def _tracker(self) -> Tracker | None:
        wandb = self.config.trainer.wandb
        return None if wandb.project is None else Tracker(wandb, self.name, self.config.to_dict(), self.output, self.reporter)

    def _loop(self, ready: "_Prepared", first: int) -> Loop:
        history = history_of(RunDirectory(self.output).events()) if is_main() else History()
        every = parse_every(self.config.trainer.checkpoint_every)
        return Loop(
            config=self.config,
            batches=TrainBatches(ready.data.train, self.config.trainer.batch_size, self.config.trainer.seed),
            ready=ready,
            saving=make_saving(every, first, agree=from_main, cost=lambda: ready.checkpoints.cost, history=history),
            evaluate=partial(self._evaluate, "during"),
            reporter=self.reporter,
            profiler=profiler_of(self.output, self.reporter),
            peak_flops=self.peak_flops,
        )

    def _evaluate(self, when: str, step: int) -> float:
        """Mean held-out loss, nats per learned token."""
        self._phase("evaluating")
        ready, trainer = self._prepared(), self.config.trainer

        def sums_of(batches: EvalBatches) -> tuple[float, float]:
            total = count = 0.0
            for k in range(batches.count):
                sums = ready.steps.evaluate(ready.state.params, put_batch(batches, k, ready.layout))
                total, count = total + float(sums[0]), count + float(sums[1])
            return total, count

        loss, parts = measure(ready.data, trainer.batch_size, trainer.eval_batches, sums_of)
        if not math.isfinite(loss):
            raise NonFinite(f"the held-out loss is {loss} at step {step}; lower trainer.lr, then start again")
        self.reporter.emit("evaluation", when=when, step=step, loss=loss, parts=parts)
        if ready.metrics:
            ready.metrics.evaluation(step, loss, parts)
        return loss

    def _write_samples(self, when: str, step: int) -> None:
        ready = self._prepared()
        if ready.sampler is None:
            return
        self._phase("evaluating")
        samples = [asdict(sample) for sample in ready.sampler(ready.state.params, ready.frozen)]
        self.reporter.emit("samples", when=when, step=step, samples=samples)
        if is_main():
            self._record_samples([{"when": when, "step": step, **sample} for sample in samples])

    def _record_samples(self, rows: list[dict[str, Any]]) -> None:
        config = self.config.trainer.samples
        file = Rows(self.output / SAMPLES)
        for row in rows:
            file.write({**row, "attempt": self.attempt, "time": time.time(), "temperature": config.temperature, "seed": config.seed})
        file.close()

    def _phase(self, name: str) -> None:
        self.reporter.emit("phase", phase=name)


@dataclass
class _Prepared:
    """What `prepare` made; `state` moves on with every step."""

    layout: Layout
    weights: ModelFolder | None
    """What model.weights names."""
    tokenizer: Tokenizer
    data: PackedData
    steps: CompiledSteps
    sampler: Sampler | None
    """None without trainer.samples.prompts."""
    blueprint: Blueprint
    checkpoints: Checkpoints
    metrics: MetricsWriter | None
    """None on every process but process 0."""
    stop: StopSignal
    state: TrainState
    frozen: Params
    """What the adapters stand beside; empty without adapters."""
