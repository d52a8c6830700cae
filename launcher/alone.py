"""Training in one process of this machine: no Ray, no cluster, no other process. For debugging, and where one host is all there is.

    python -m launcher.training trainer.steps=20                       the same overrides as launch.py
    python -m launcher.training --config runs/mine/config.yaml         the config of a run
    python -m launcher.training --devices 8 ...                        so many of XLA's CPU devices, instead of what JAX finds

It is the job that hosts run, on the same config, so with as many devices it has the same mesh, batches and losses. The run directory is the
same too: what looks at runs works for it. Of the `run` settings those that need a cluster mean nothing here: budgets, limits, spares.
Ctrl-C ends it at the next step with a checkpoint, a second one at once.
"""

import argparse
import contextlib
import fcntl
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from cluster.errors import ConfigError, PodlaunchError
from cluster.state import cache_dir
from launcher.attempts import next_attempt
from launcher.claims import Claims
from launcher.compose import compose_config, compose_file, load
from launcher.config import LaunchConfig
from launcher.data.check import check_data
from launcher.follow import EXIT_INTERRUPTED, EXIT_JOB_FAILED, EXIT_OK, News, print_summary
from launcher.gang.record import RunRecord, failure_of
from launcher.goodput import Phase
from launcher.guard import guarded
from launcher.preflight import check_resume, check_wandb
from launcher.run_files import is_object
from launcher.runs import ALONE, AT_REST, RunDirectory, RunState, RunStatus, new_run_id
from launcher.weights.check import check_weights
from launcher.weights.tokenizer import tokenizer_of

if TYPE_CHECKING:
    from launcher.training.job import TrainingJob

_LOCK = "alone.lock"


def main() -> None:
    """Ends the interpreter with the exit code of `launch.py`."""
    parser = _Parser(prog="python -m launcher.training", description="Train in this process alone.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for launch.py")
    parser.add_argument("--config", type=Path, help="a YAML file of settings, such as the config.yaml of a run")
    parser.add_argument("--output-dir", type=Path, help="the run directory; by default run.root/run.name, as for launch.py")
    parser.add_argument("--devices", type=int, help="so many CPU devices, instead of what JAX finds")
    parser.add_argument("--resume", action="store_true", help="go on from the newest good checkpoint")
    arguments = parser.parse_intermixed_args()
    if arguments.devices is not None and arguments.devices < 1:
        parser.error("--devices: give a whole number of at least 1")

    def run() -> int:
        resume = ["run.resume=true"] if arguments.resume else []
        config = _compose(arguments.config, [*arguments.overrides, *resume], arguments.output_dir)
        _use_devices(arguments.devices)
        return train(config, Console())

    sys.exit(guarded(run, "training"))


class _Parser(argparse.ArgumentParser):
    """Whose errors are one line, as those of all commands."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; `--help` tells what there is", file=sys.stderr)
        sys.exit(ConfigError.exit_code)


def train(config: LaunchConfig, console: Console) -> int:
    """Train what `config` says in its run directory; returns the exit code. Raises ConfigError before anything is begun."""
    assert config.run.root is not None
    run = RunDirectory(f"{config.run.root.rstrip('/')}/{config.run.name or new_run_id(config.what, time.time())}")
    _check(config, run)
    _connect(config)
    with _only_one(run):
        record = _begin(config, run)
        code = _Training(config, run, record, console).run()
    print_summary(run, record.status, console)
    return code


def _compose(file: Path | None, overrides: Sequence[str], output: Path | None) -> LaunchConfig:
    place = [] if output is None else [f"run.root='{output.absolute().parent}'", f"run.name='{output.name}'"]
    given = [*overrides, *place]
    config = load(compose_config(given)) if file is None else compose_file(file, given)
    if config.is_script:
        raise ConfigError("job=script is your own program: start it with python itself")
    return config.with_environment({**os.environ}).with_absolute_paths()


def _connect(config: LaunchConfig) -> None:
    """Set JAX up as a host's process does. Raises ConfigError when the mesh does not fit its devices."""
    import jax

    from launcher.training.child import Gang, connect

    connect(Gang(None, 1, 0))
    config.training.check_devices(len(jax.devices()))
    if config.run.code is not None:
        sys.path.append(config.run.code)


def _use_devices(count: int | None) -> None:
    """Before JAX is imported."""
    os.environ.setdefault("PODLAUNCH_COMPILATION_CACHE", str(cache_dir() / "compilation"))
    if count is not None:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()


def _check(config: LaunchConfig, run: RunDirectory) -> None:
    if is_object(run.url):
        raise ConfigError(f"run.root {config.run.root}: give a local folder, with --output-dir or run.root")
    if run.exists() and not config.run.resume:
        raise ConfigError(f"run {run.run_id!r} exists; go on with it by --resume, or choose another run.name")
    if config.run.resume and not run.exists():
        raise ConfigError(f"there is no run {run.run_id!r} in {config.run.root} to go on with")
    if run.exists():
        check_resume(config, run.config(), run.status())
    check_data(config.training, tokenizer_of(config.training.data, check_weights(config.training.model)))
    check_wandb(config)


@contextlib.contextmanager
def _only_one(run: RunDirectory) -> Iterator[None]:
    """No other process of this kind trains in this run directory. The kernel frees the lock of one that dies."""
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        file = (run.path / _LOCK).open("w")
    except OSError as error:
        raise ConfigError(f"run.root: cannot write into {run.path}: {error.strerror}; choose another place with --output-dir") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"run {run.run_id!r} is being trained by another process") from None
        yield


def _begin(config: LaunchConfig, run: RunDirectory) -> RunRecord:
    """Claim the run's next attempt and write its status."""
    before, attempt, now = run.status(), next_attempt(run), time.time()
    if before is not None and before.state not in AT_REST and before.cluster != ALONE:
        raise ConfigError(f"run {run.run_id!r} is {before.state} on cluster {before.cluster!r}; stop it with: tpu train stop {run.url}")
    job = f"alone-{os.getpid()}"
    if not Claims(run.files).claim(attempt, job):
        raise ConfigError(f"run {run.run_id!r} is being started by another command")
    run.create(config)
    run.clear_stop_request()
    status = RunStatus(
        run_id=run.run_id,
        cluster=ALONE,
        state=RunState.STARTING,
        started_at=now,
        updated_at=now,
        attempt=attempt,
        job=job,
        hosts=1,
        total_steps=config.total_steps,
    )
    if before is not None:
        status = status.after(before.accounted_until(now))
    record = RunRecord(run, status, time.time, None)
    record.begin_attempt()
    record.enter(RunState.RUNNING, Phase.STARTING)
    return record


class _Training:
    """One attempt; the reporter of its job."""

    def __init__(self, config: LaunchConfig, run: RunDirectory, record: RunRecord, console: Console) -> None:
        self._config, self._run, self._record, self._console = config, run, record, console
        self._news = News(run)
        self._lock = threading.Lock()
        self._job: TrainingJob | None = None

    def run(self) -> int:
        """The exit code; the record has its final state."""
        before = signal.signal(signal.SIGINT, self._interrupted)
        try:
            return self._train()
        except KeyboardInterrupt:
            return self._end(RunState.STOPPED, EXIT_INTERRUPTED, reason="interrupted")
        except Exception as error:  # noqa: BLE001  # whatever goes wrong with the training is the run's failure
            traceback.print_exception(error)
            told = str(error) if isinstance(error, PodlaunchError) else f"{type(error).__name__}: {error}"
            return self._end(RunState.FAILED, EXIT_JOB_FAILED, first_failure=failure_of("this process", told))
        finally:
            signal.signal(signal.SIGINT, before)

    def _train(self) -> int:
        from launcher.training.job import Preempted, TrainingJob

        claims, attempt, allow = Claims(self._run.files), self._record.status.attempt, self._config.run.allow
        with TrainingJob(
            self._config.training, self._run.path, self, attempt=attempt, allow=allow, may_publish=lambda: claims.check(attempt)
        ) as job:
            self._job = job
            try:
                job.prepare()
                job.execute()
            except Preempted as stopped:
                return self._end(RunState.STOPPED, EXIT_INTERRUPTED, reason=f"interrupted, with a checkpoint of step {stopped.step}")
            finally:
                self._job = None
        return self._end(RunState.SUCCEEDED, EXIT_OK)

    def emit(self, event: str, **values: Any) -> None:
        """As launcher.training.reporter.Reporter: into the run directory, and onto the console."""
        with self._lock:
            self._record.apply({"event": event, "time": time.time(), **values})
            self._record.tick()
            self._tell()

    def _end(self, state: RunState, code: int, **fields: Any) -> int:
        with self._lock:
            self._record.enter(state, "", ended_at=time.time(), **fields)
            self._tell()
        return code

    def _tell(self) -> None:
        for line in self._news.lines(self._record.status):
            self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _interrupted(self, _number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the next one ends it at once
        if self._job is None or not self._job.ask_to_stop():
            raise KeyboardInterrupt
        print("\nending at the next step, with a checkpoint; Ctrl-C again ends at once", file=sys.stderr)
