"""The configuration of a run: frozen dataclasses, validated; the only schema behind conf/, YAML files and Python calls.

    LaunchConfig                 everything that `python launch.py` composes
    ├── run      RunConfig       name, place and life of the run
    ├── cluster  ClusterConfig   where it runs (cluster/config.py)
    ├── job      JobConfig       what the hosts run: our training, or a script of the user's, which needs nothing of what follows
    ├── model    ModelConfig   ┐
    ├── data     DataConfig    ├ TrainingConfig: what is trained; needs no cluster (data: launcher/data/config.py)
    └── trainer  TrainerConfig ┘

Every check that needs no cloud stands here or in `launcher/preflight.py`, so that a wrong setting costs no cloud second.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from cluster.config import ClusterConfig
from cluster.durations import parse_duration
from cluster.errors import ConfigError
from cluster.schema import at_least, build, did_you_mean, to_plain
from cluster.yaml_files import read_settings
from launcher.data.config import DataConfig
from launcher.entrypoint import Entrypoint, parse_entrypoint
from launcher.mesh import MeshConfig
from launcher.models.config import ModelConfig
from launcher.training.saving import parse_every

RUN_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
COMPUTE_DTYPES = ("float32", "bfloat16")
OPTIMIZERS, SCHEDULES, NO_DECAY = ("adamw", "adafactor", "sgd"), ("cosine", "linear", "constant"), ("norm", "embed")
WANDB_MODES = ("online", "offline")
REMATS = ("auto", "none", "dots", "full")
REMAT_FROM_PARAMETERS = 100_000_000
"""Smaller models keep their activations: they fit, and computing them twice costs a third of the step."""
JOBS = ("train", "script")
RESUME_TOPICS = ("model", "data", "seed", "batch_size", "seq_len", "compute_dtype", "optimizer")
"""What must not change on a resume unless `run.allow` names it (launcher/curve.py)."""


@dataclass(frozen=True)
class BudgetConfig:
    """How many times a failed gang is started again, by the cause of the failure, before the run counts as FAILED; null: without limit."""

    preempted: int | None = None
    """The cloud took a slice away."""
    infrastructure: int | None = 10
    """A machine, a host or the network failed, or a process was killed from outside."""
    oom: int | None = 0
    """Host or device memory was too small."""
    application: int | None = 0
    """The program itself failed."""
    backoff: str = "2s"
    """Before an attempt that follows one which came no further than those before it; twice as long each time."""
    backoff_limit: str = "5m"

    def __post_init__(self) -> None:
        for name in ("preempted", "infrastructure", "oom", "application"):
            if (value := getattr(self, name)) is not None:
                at_least(f"run.budget.{name}", value, 0)
        for name in ("backoff", "backoff_limit"):
            try:
                parse_duration(getattr(self, name))
            except ValueError as error:
                raise ConfigError(f"run.budget.{name} {error}") from None

    @property
    def backoff_seconds(self) -> float:
        return parse_duration(self.backoff)

    @property
    def backoff_limit_seconds(self) -> float:
        return parse_duration(self.backoff_limit)


@dataclass(frozen=True)
class HangConfig:
    """When a gang whose processes live and make no progress counts as hung, and is started again."""

    steps: float = 10.0
    """Between steps: so many times the median step."""
    floor: str = "5m"
    """... but not before so long, however fast the steps are."""
    quiet: str = "1h"
    """Where nothing is told step by step (connecting, compiling, restoring, evaluating, saving, exporting): longer than the longest."""

    def __post_init__(self) -> None:
        if not self.steps >= 1:
            raise ConfigError(f"run.hang.steps {self.steps}: give a number of at least 1")
        for name in ("floor", "quiet"):
            try:
                parse_duration(getattr(self, name))
            except ValueError as error:
                raise ConfigError(f"run.hang.{name} {error}") from None

    @property
    def floor_seconds(self) -> float:
        return parse_duration(self.floor)

    @property
    def quiet_seconds(self) -> float:
        return parse_duration(self.quiet)


@dataclass(frozen=True)
class RunConfig:
    """Name, place and life of one run."""

    name: str | None = None
    """Null: `<variant>-<date>-<time>-<short hash>`."""
    root: str | None = None
    """The folder that holds run directories; null: `runs` for a cluster of this machine, else gs://$PODLAUNCH_BUCKET/runs."""
    slice_type: str | None = None
    """Which of cluster.node_types the run uses; null: the cluster's own type."""
    resume: bool = False
    """Go on with the run of this name from its newest good checkpoint."""
    allow: list[str] = field(default_factory=list)
    """What a resume may find changed: any of model, data, seed, batch_size, seq_len, compute_dtype, optimizer."""
    code: str | None = None
    """A folder of your own modules to ship with the run; importable in the training processes only. Null: none, but for job=script the
    folder that you start from.
    """
    spares: bool = True
    """Whether every host keeps a second process waiting that has everything imported, for the next restart."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    hang: HangConfig = field(default_factory=HangConfig)
    max_hours: float | None = None
    """The run checkpoints and ends as STOPPED after so many hours in all, those without an attempt (it had ended) not counted."""
    max_usd: float | None = None
    """The same when its slices have cost so many US dollars in all, at the catalogue's list price."""
    secrets: list[str] = field(default_factory=list)
    """Names of environment variables (or .env entries) handed to the training processes. Never values."""

    def __post_init__(self) -> None:
        if self.name is not None and not RUN_NAME.fullmatch(self.name):
            raise ConfigError(
                f"run.name {self.name!r}: use lower-case letters, digits, '-', '_' and '.', at most 63, "
                "beginning and ending with a letter or digit"
            )
        if self.root == "":
            raise ConfigError("run.root is empty: give a local path, or gs://<bucket>/<folder>; left out, it is ./runs")
        if self.resume and self.name is None:
            raise ConfigError("run.resume=true needs run.name=<the run to go on with>")
        for name in ("max_hours", "max_usd"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"run.{name} {value}: give a positive number, or null for no limit")
        for topic in self.allow:
            if topic not in RESUME_TOPICS:
                raise ConfigError(f"run.allow: {topic!r} is nothing that a resume checks{did_you_mean(topic, RESUME_TOPICS)}")


@dataclass(frozen=True)
class JobConfig:
    """What every host of the run starts: the training of model, data and trainer, or the user's own program."""

    kind: str = "train"
    """train or script."""
    entrypoint: str | None = None
    """The command line of the user's own program, for job=script (launcher/entrypoint.py)."""

    def __post_init__(self) -> None:
        if self.kind not in JOBS:
            raise ConfigError(f"job.kind {self.kind!r} is unknown{did_you_mean(self.kind, JOBS)}")
        if self.kind == "train" and self.entrypoint is not None:
            raise ConfigError(f"job.entrypoint {self.entrypoint!r} needs job=script: it is your own program")
        if self.kind == "script" and self.entrypoint is None:
            raise ConfigError('job.entrypoint is missing: give job.entrypoint="train.py --lr 1e-3", relative to run.code')
        if self.kind == "script":
            _ = self.program  # a wrong one is refused here

    @property
    def program(self) -> Entrypoint:
        """Of job=script. Raises ConfigError for what is none."""
        assert self.entrypoint is not None
        try:
            return parse_entrypoint(self.entrypoint)
        except ValueError as error:
            raise ConfigError(f"job.entrypoint {self.entrypoint!r}: {error}") from error


@dataclass(frozen=True)
class SamplesConfig:
    """Texts that the model writes before the first step and after the last, to be read by people."""

    prompts: list[str] = field(default_factory=list)
    """What each of them begins with; none: nothing is written."""
    chat: bool = False
    """Whether a prompt is what the user says in a conversation, which the model answers."""
    max_tokens: int = 64
    """Of each text, at most; it ends with an end-of-text or end-of-turn token."""
    temperature: float = 0.0
    """What logits are divided by before a token is drawn; 0 takes the likeliest one always."""
    seed: int = 0
    """Of the drawing: the same seed, prompts and weights give the same texts."""

    def __post_init__(self) -> None:
        at_least("trainer.samples.max_tokens", self.max_tokens, 1)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"trainer.samples.temperature {self.temperature}: give 0 or a positive number, for example 0.8")


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, beside metrics.jsonl and TensorBoard; needs the extra `wandb`, and WANDB_API_KEY among run.secrets."""

    project: str | None = None
    """Null: nothing is sent."""
    entity: str | None = None
    """A user or a team; null: the one that the key belongs to."""
    group: str | None = None
    mode: str = "online"
    """online, or offline: into wandb/ of the run directory, to be sent later with `wandb sync`; needs no key."""

    def __post_init__(self) -> None:
        if self.mode not in WANDB_MODES:
            raise ConfigError(f"trainer.wandb.mode {self.mode!r} is unknown{did_you_mean(self.mode, WANDB_MODES)}")


@dataclass(frozen=True)
class TrainerConfig:
    """Hyperparameters and habits of the training loop. Counts are optimizer steps, sizes are global."""

    steps: int = 60
    batch_size: int = 8
    """Sequences in one step, over all devices."""
    seq_len: int = 128
    """Tokens in one sequence."""
    lr: float | None = None
    """Peak learning rate; null takes the variant's default."""
    optimizer: str = "adamw"
    """adamw, adafactor (no momentum; second moments factored) or sgd."""
    schedule: str = "cosine"
    """How the learning rate falls after the warm-up: cosine, linear or constant."""
    warmup_steps: int = 10
    final_lr_fraction: float = 0.1
    """The decay of the learning rate ends at this fraction of `lr`."""
    weight_decay: float = 0.01
    """Decoupled: every update also takes lr times so much of a weight away."""
    no_decay: list[str] = field(default_factory=lambda: ["norm"])
    """What does not decay: any of norm, embed."""
    momentum: float = 0.9
    """Of sgd."""
    accumulate: int = 1
    """The batch is worked off in so many parts, one after another: less memory for the same update."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    compute_dtype: str = "float32"
    """float32, or bfloat16 over float32 master weights."""
    remat: str = "auto"
    """What of a layer the backward pass computes again instead of keeping it: none; dots: all but the matrix products; full; auto: full
    from 100 M parameters on, else none. Changes memory and time, not the result.
    """
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seed: int = 0
    log_every: int = 5
    eval_batches: int = 8
    """Held-out batches of one evaluation, at most; there is one before the first step and one after the last."""
    eval_every: int | None = None
    """Steps between two evaluations during training; null: none."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    checkpoint_every: int | str = 20
    """Steps (20), a length of time (10m), or auto: from what a checkpoint costs and how often the run fails."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints are kept."""
    keep_every: int | None = None
    """Besides these, the first checkpoint at or after every multiple of so many steps is kept for good."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "log_every", "eval_batches", "keep_checkpoints", "accumulate"):
            at_least(f"trainer.{name}", getattr(self, name), 1)
        for name in ("keep_every", "eval_every"):
            if (value := getattr(self, name)) is not None:
                at_least(f"trainer.{name}", value, 1)
        parse_every(self.checkpoint_every)
        at_least("trainer.warmup_steps", self.warmup_steps, 0)
        if self.seq_len < 8:
            raise ConfigError(f"trainer.seq_len {self.seq_len}: a sequence needs at least 8 tokens")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"trainer.lr {self.lr}: give a positive number, for example 1e-4")
        if not self.max_grad_norm > 0:
            raise ConfigError(f"trainer.max_grad_norm {self.max_grad_norm}: give a positive number, for example 1.0")
        for name in ("final_lr_fraction", "beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"trainer.{name} {getattr(self, name)}: give a number from 0 to 1")
        if self.weight_decay < 0 or self.epsilon <= 0:
            raise ConfigError("trainer.weight_decay must not be negative and trainer.epsilon must be positive")
        choices = {"compute_dtype": COMPUTE_DTYPES, "remat": REMATS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"trainer.{name} {value!r} is unknown{did_you_mean(value, known)}")
        for kind in self.no_decay:
            if kind not in NO_DECAY:
                raise ConfigError(f"trainer.no_decay: {kind!r} is unknown{did_you_mean(kind, NO_DECAY)}")


@dataclass(frozen=True)
class TrainingConfig:
    """What is trained: model, dataset, hyperparameters. Needs no cluster; `TrainingJob` takes it as it is."""

    model: ModelConfig
    data: DataConfig
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises ConfigError, one line, for an unknown key, a wrong type or an impossible value."""
        return build(cls, values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Raises ConfigError for a missing or unreadable file, broken YAML, and whatever `from_dict` refuses."""
        return cls.from_dict(read_settings(path))

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: the one given, else the variant's default."""
        return self.trainer.lr if self.trainer.lr is not None else self.model.shape.default_lr

    @property
    def flops_per_token(self) -> float:
        """Of one training step."""
        return self.model.shape.flops_per_token(self.trainer.seq_len, frozen=bool(self.model.lora.rank))

    @property
    def remat(self) -> str:
        """`trainer.remat` with auto decided."""
        if self.trainer.remat != "auto":
            return self.trainer.remat
        return "full" if self.model.shape.parameters >= REMAT_FROM_PARAMETERS else "none"

    def check_devices(self, devices: int, slices: int | None = None) -> MeshConfig:
        """The mesh for `devices` devices (of as many slices as it says, where `slices` is not given), what is open in it data-parallel.

        Raises ConfigError when mesh or batch do not fit them.
        """
        mesh = self.trainer.mesh.resolve(devices, slices or self.trainer.mesh.slices or 1)
        batch, shards = self.trainer.batch_size, mesh.batch_shards
        if batch % shards:
            near = max(shards, batch // shards * shards)
            slices_of = f"slices {mesh.slices} x " if mesh.slices != 1 else ""
            raise ConfigError(
                f"trainer.batch_size {batch} is not divisible by the {shards} data shards of the mesh "
                f"({slices_of}data {mesh.data} x fsdp {mesh.fsdp}); use trainer.batch_size={near}"
            )
        if batch // shards % self.trainer.accumulate:
            raise ConfigError(
                f"trainer.accumulate {self.trainer.accumulate} does not divide the {batch // shards} sequences of a data shard "
                f"(trainer.batch_size {batch} over {shards})"
            )
        shape = mesh.shape
        if self.trainer.seq_len % shape["sequence"]:
            raise ConfigError(f"trainer.mesh.sequence {mesh.sequence} does not divide trainer.seq_len {self.trainer.seq_len}")
        self.model.shape.check_sharding(fsdp=shape["fsdp"], tensor=shape["tensor"])
        return mesh


@dataclass(frozen=True)
class LaunchConfig:
    """Everything about one launch; what config.yaml of a run directory holds."""

    cluster: ClusterConfig
    model: ModelConfig | None = None
    """This and `data` are None for job=script, and only then."""
    data: DataConfig | None = None
    run: RunConfig = field(default_factory=RunConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    job: JobConfig = field(default_factory=JobConfig)

    def __post_init__(self) -> None:
        if self.is_script:
            self._check_script()
        else:
            _ = self.training_on_slices  # a mesh or a batch that does not fit the slices is refused
        if self.run.max_usd is not None and self.slices.usd_per_hour is None:
            raise ConfigError(f"run.max_usd {self.run.max_usd:g}: the catalogue has no price of these slices; use run.max_hours")

    def _check_script(self) -> None:
        _ = self.slices  # a type of slice that the cluster lacks is refused
        means_nothing = {"model": self.model is not None, "data": self.data is not None, "trainer": self.trainer != TrainerConfig()}
        if given := [group for group, is_given in means_nothing.items() if is_given]:
            raise meaningless_for_script(given[0])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises ConfigError, one line, for an unknown key, a wrong type or an impossible combination."""
        return build(cls, values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        return cls.from_dict(read_settings(path))

    def to_dict(self) -> dict[str, Any]:
        """Without what means nothing to a script."""
        plain = to_plain(self)
        return {name: value for name, value in plain.items() if not (self.is_script and name in ("model", "data", "trainer"))}

    @property
    def is_script(self) -> bool:
        return self.job.kind == "script"

    @property
    def what(self) -> str:
        """One word for what runs, for names of runs."""
        if not self.is_script:
            return self.training.model.variant
        return re.sub(r"[^a-z0-9]+", "-", self.job.program.name.lower()).strip("-")[:30] or "script"

    @property
    def total_steps(self) -> int:
        """0 for a script: it says that itself, or nothing."""
        return 0 if self.is_script else self.trainer.steps

    @property
    def slices(self) -> ClusterConfig:
        """The cluster as the run sees it: with the type of slice that it uses. Raises ConfigError for a type that the cluster lacks."""
        return self.cluster.of_type(self.run.slice_type)

    @property
    def training(self) -> TrainingConfig:
        """Of job=train. Raises ConfigError when model or data is missing."""
        for name, group in (("model", self.model), ("data", self.data)):
            if group is None:
                raise ConfigError(f"missing setting {name!r}: it has no default, give it a value")
        assert self.model is not None
        assert self.data is not None
        return TrainingConfig(self.model, self.data, self.trainer)

    @property
    def training_on_slices(self) -> TrainingConfig:
        """The same with trainer.mesh in numbers, for the run's slices. Raises ConfigError when it does not fit them."""
        given = self.training
        return dataclasses.replace(given, trainer=dataclasses.replace(self.trainer, mesh=self._mesh(given)))

    def _mesh(self, given: TrainingConfig) -> MeshConfig:
        """trainer.mesh in numbers. On devices that are no TPUs nothing is chosen: collectives of emulated hosts are slow, so they train
        data-parallel unless the user says otherwise.
        """
        slices = self.slices
        if slices.cloud != "emulated" and given.trainer.mesh.is_open and -1 not in dataclasses.astuple(given.trainer.mesh):
            from launcher.estimate.choose import choose_mesh  # which knows this schema

            return choose_mesh(given, slices.accelerator, slices.slices)
        return given.check_devices(slices.chips, slices.slices)

    def with_absolute_paths(self) -> Self:
        """With local paths made absolute: the training processes have another working directory."""
        data = self.data and self.data.with_paths({name: absolute(path) for name, path in self.data.paths().items()})
        code = self.run.code or ("." if self.is_script else None)
        run = dataclasses.replace(self.run, root=self.run.root and absolute(self.run.root), code=code and absolute(code))
        model = self.model and dataclasses.replace(self.model, weights=self.model.weights and absolute(self.model.weights))
        return dataclasses.replace(self, model=model, data=data, run=run)

    def with_environment(self, env: Mapping[str, str]) -> Self:
        """With project, zones and run.root from the environment where none was given. Raises ConfigError when run.root stays open."""
        root = self.run.root
        if root is None and self.cluster.cloud == "emulated":
            root = "runs"
        if root is None and env.get("PODLAUNCH_BUCKET"):
            root = f"gs://{env['PODLAUNCH_BUCKET']}/runs"
        if root is None:
            raise ConfigError(
                "run.root is missing: set PODLAUNCH_BUCKET, or give run.root=gs://<bucket>/<folder>; every host must reach it"
            )
        return dataclasses.replace(self, run=dataclasses.replace(self.run, root=root), cluster=self.cluster.with_environment(env))


def meaningless_for_script(group: str) -> ConfigError:
    return ConfigError(f"job=script runs your own program, which {group} means nothing to: leave it out, or choose job=train")


def absolute(path: str) -> str:
    """With the working directory in front, unless it is a URL."""
    return path if "://" in path else str(Path(path).expanduser().absolute())
