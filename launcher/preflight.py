"""Checks of a launch that look at the disk: run directory, resume, data, code. Nothing is started or changed before all have passed."""

import importlib.util
import tempfile
import time
from pathlib import Path

from cluster.errors import ConfigError
from cluster.storage import split_url
from launcher.code import pack, user_files
from launcher.config import LaunchConfig
from launcher.curve import check_same_curve, meaning_of
from launcher.data.check import check_data
from launcher.data.tokenizer import Tokenizer
from launcher.environment import present
from launcher.limits import limit_reached
from launcher.run_files import is_object
from launcher.runs import AT_REST, RunDirectory, RunState, RunStatus, new_run_id
from launcher.weights.check import check_weights
from launcher.weights.tokenizer import tokenizer_of

_CHECK = ".write-check"
_WANDB_KEY = "WANDB_API_KEY"


def prepare_run(config: LaunchConfig, endpoint: str | None = None) -> tuple[RunDirectory, bytes]:
    """The run's directory (not yet written) and its code. `endpoint`: as for Bucket, where run.root is on gs://.

    Raises ConfigError, one line, for whatever stands against the launch, CloudError when the place of the run does not answer.
    """
    return check_run(config, endpoint), pack_code(config)


def pack_code(config: LaunchConfig) -> bytes:
    """Raises ConfigError when run.code is missing or too large."""
    return pack(Path(config.run.code) if config.run.code else None)


def check_run(config: LaunchConfig, endpoint: str | None = None) -> RunDirectory:
    """The run's directory (not yet written). Arguments and errors as above."""
    run_id = config.run.name or new_run_id(config.what, time.time())
    assert config.run.root is not None, "filled in by with_environment"
    _check_root(config.run.root, config)
    run = RunDirectory(f"{config.run.root.rstrip('/')}/{run_id}", endpoint)
    if is_object(run.url):
        _check_bucket(run)
    else:
        _check_folder(run.path)
    if run.exists():
        _check_existing(config, run)
    elif config.run.resume:
        raise ConfigError(f"run.resume=true: there is no run {run_id!r} in {config.run.root}")
    if config.is_script:
        _check_program(config)
    else:
        check_data(config.training, _check_weights(config, endpoint))
        check_wandb(config)
    return run


def check_resume(config: LaunchConfig, before: LaunchConfig, status: RunStatus | None) -> None:
    """Raises ConfigError when `config` cannot go on where `before` stopped. Of a script nobody but itself can tell."""
    if status is not None and (limit := limit_reached(config.run, status.phases, status.costs)) is not None:
        raise ConfigError(f"{limit} by what the run has used already; give more to go on with it")
    if config.is_script != before.is_script:
        raise ConfigError(f"the run was made with job={before.job.kind}; choose another run.name for job={config.job.kind}")
    if config.is_script:
        return
    check_same_curve(meaning_of(before.training), meaning_of(config.training), config.run.allow, "the run")
    if status is not None and status.state is RunState.SUCCEEDED and config.trainer.steps <= status.step:
        raise ConfigError(f"the run is finished at step {status.step}; to train it further give trainer.steps above that")


def check_wandb(config: LaunchConfig) -> None:
    """Raises ConfigError when the training processes could not tell Weights & Biases of the run."""
    wandb = config.trainer.wandb
    if wandb.project is None:
        return
    if config.cluster.on_this_machine and importlib.util.find_spec("wandb") is None:
        raise ConfigError("trainer.wandb.project: wandb is not installed here: pip install 'podlaunch[wandb]'")
    if wandb.mode == "offline":
        if is_object(config.run.root or ""):
            raise ConfigError("trainer.wandb.mode=offline writes into a local run directory, and run.root is on gs://; use online")
    elif _WANDB_KEY not in config.run.secrets or not present([_WANDB_KEY]):
        raise ConfigError(
            f"trainer.wandb.project: {_WANDB_KEY} is not among run.secrets or not set; put the key into .env, or give "
            "trainer.wandb.mode=offline"
        )


def _check_root(root: str, config: LaunchConfig) -> None:
    if is_object(root):
        try:
            split_url(root)
        except ValueError as error:
            raise ConfigError(f"run.root {error}") from error
    elif "://" in root:
        raise ConfigError(f"run.root {root}: give a local path, or gs://<bucket>/<folder>")
    elif not config.cluster.on_this_machine:
        raise ConfigError(
            f"run.root {root}: the hosts of cluster {config.cluster.name!r} do not see this machine's files; "
            "give run.root=gs://<bucket>/<folder>, or set PODLAUNCH_BUCKET"
        )


def _check_bucket(run: RunDirectory) -> None:
    """To ask for permissions would need one more: write and delete."""
    run.files.write(_CHECK, b"")
    run.files.remove(_CHECK)


def _check_folder(place: Path) -> None:
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):  # to ask for permissions is not enough: root has them all, even on a read-only disk
            return
    except OSError as error:
        raise ConfigError(f"run.root: cannot write into {place}: {error.strerror}; choose another place with run.root=<folder>") from error


def _check_existing(config: LaunchConfig, run: RunDirectory) -> None:
    status = run.status()
    if status is not None and status.state not in AT_REST:
        raise ConfigError(
            f"run {run.run_id!r} is {status.state} already; follow it with `tpu train attach {run.run_id}`, or choose another run.name"
        )
    if not config.run.resume:
        state = "" if status is None else f" ({status.state} at step {status.step})"
        raise ConfigError(f"run {run.run_id!r} exists{state}; go on with it by run.resume=true, or choose another run.name")
    check_resume(config, run.config(), status)


def _check_weights(config: LaunchConfig, endpoint: str | None) -> Tokenizer:
    """The tokenizer of the run."""
    model = config.training.model
    if model.weights is not None and "://" not in model.weights and not config.cluster.on_this_machine:
        raise ConfigError(
            f"model.weights {model.weights}: the hosts of cluster {config.cluster.name!r} do not see this machine's files; "
            "copy the folder to Cloud Storage and give gs://<bucket>/<folder>"
        )
    return tokenizer_of(config.training.data, check_weights(model, endpoint))


def _check_program(config: LaunchConfig) -> None:
    """Raises ConfigError when the program of job.entrypoint is not among what is sent to the hosts."""
    assert config.run.code is not None, "filled in by with_absolute_paths"
    program, folder = config.job.program, Path(config.run.code)
    sent, found = set(user_files(folder)), program.find(folder)
    if found is not None and found in sent:
        return
    if found is not None:
        raise ConfigError(f"job.entrypoint: {found} is in a folder that is not sent to the hosts; move it, or choose another run.code")
    if program.file is not None:
        raise ConfigError(f"job.entrypoint: there is no {program.file} in {folder}; give its path relative to run.code=<folder>")
    top = str(program.module).partition(".")[0]
    ours = any(path.relative_to(folder).parts[0] in (top, f"{top}.py") for path in sent)
    if ours or importlib.util.find_spec(top) is None:
        raise ConfigError(f"job.entrypoint: there is no module {program.module} to run in {folder}, and none is installed")
