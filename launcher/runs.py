"""The run directory: the only truth about a run. One writer and one reader for everything that is in it.

    <run.root>/<run_id>/
      config.yaml  code.zip  status.json  events.jsonl  metrics.jsonl
      logs/<attempt>/host-<i>.log  checkpoints/<step>/  export/  tensorboard/
      claims/<attempt>.json  whose attempt it is (launcher/claims.py)
      stop                   present once somebody asked the run to stop; it holds `suspend` when the run shall go on later

The command line, the dashboard and outside scripts read it; only whoever holds the newest claim (the run's supervisor, or who submits or
ends the run in its place) writes status.json and events.jsonl, and only process 0 of the training gang writes metrics.jsonl.
"""

import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import ConfigError, PodlaunchError
from cluster.state import read_json, write_atomic
from launcher.config import LaunchConfig


class RunState(StrEnum):
    """Where a run stands. `RunState.SUCCEEDED`, FAILED and STOPPED are final."""

    QUEUED = "QUEUED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    RECOVERING = "RECOVERING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"
    SUSPENDED = "SUSPENDED"


_SUSPEND = "suspend"
FINAL = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.STOPPED})

TRANSITIONS: Mapping[RunState, frozenset[RunState]] = {
    RunState.QUEUED: frozenset({RunState.STARTING, RunState.FAILED, RunState.STOPPED, RunState.SUSPENDED}),
    RunState.STARTING: frozenset(
        {RunState.RUNNING, RunState.RECOVERING, RunState.SUCCEEDED, RunState.FAILED, RunState.STOPPED, RunState.SUSPENDED}
    ),
    RunState.RUNNING: frozenset({RunState.RECOVERING, RunState.SUCCEEDED, RunState.FAILED, RunState.STOPPED, RunState.SUSPENDED}),
    RunState.RECOVERING: frozenset({RunState.RUNNING, RunState.SUCCEEDED, RunState.FAILED, RunState.STOPPED, RunState.SUSPENDED}),
    # A finished run is taken up again only by run.resume=true, a suspended one also by the next start of its cluster.
    RunState.SUCCEEDED: frozenset({RunState.QUEUED}),
    RunState.FAILED: frozenset({RunState.QUEUED}),
    RunState.STOPPED: frozenset({RunState.QUEUED}),
    RunState.SUSPENDED: frozenset({RunState.QUEUED, RunState.STOPPED}),
}


@dataclass(frozen=True)
class FirstFailure:
    """The first host that failed in the run's last failed attempt, and its first error."""

    host: str
    error: str


@dataclass(frozen=True)
class Recoveries:
    """How often the run was recovered, by cause."""

    preempted: int = 0
    infrastructure: int = 0
    oom: int = 0
    application: int = 0

    @property
    def total(self) -> int:
        return self.preempted + self.infrastructure + self.oom + self.application


@dataclass(frozen=True)
class RunStatus:
    """What status.json holds. Times are seconds since the epoch, `phases` seconds spent by phase."""

    run_id: str
    cluster: str
    state: RunState
    attempt: int = 0
    phase: str = ""
    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    hosts: int = 0
    slices: list[str] = field(default_factory=list)
    recoveries: Recoveries = field(default_factory=Recoveries)
    goodput: float | None = None
    cost_usd: float | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None
    checkpoint: int | None = None
    started_at: float = 0.0
    updated_at: float = 0.0
    ended_at: float | None = None
    reason: str | None = None
    first_failure: FirstFailure | None = None
    phases: dict[str, float] = field(default_factory=dict)
    job: str | None = None
    restarts: int = 0
    """How much of run.max_restarts is spent since a person last asked for the run."""
    quiet_at: float = 0.0
    """From then on no process of an earlier attempt lives any more, whatever became of its supervisor."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunStatus":
        """Keys that a later version added are passed over, so that an older reader keeps working."""
        known = {f.name for f in fields(cls)}
        plain = {key: value for key, value in values.items() if key in known}
        plain["state"] = RunState(plain["state"])
        plain["recoveries"] = Recoveries(**plain.get("recoveries", {}))
        failure = plain.get("first_failure")
        plain["first_failure"] = FirstFailure(**failure) if failure else None
        return cls(**plain)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class RunDirectory:
    """One run's folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def code(self) -> Path:
        return self.path / "code.zip"

    def exists(self) -> bool:
        return (self.path / "config.yaml").exists()

    def create(self, config: LaunchConfig) -> None:
        """Make the folder and write its config.yaml. Raises ConfigError when the place is not writable."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False), mode=0o644)
        except OSError as error:
            advice = "choose another place with run.root=<folder>"
            raise ConfigError(f"cannot write the run directory {self.path}: {error.strerror}; {advice}") from error

    def config(self) -> LaunchConfig:
        return LaunchConfig.from_yaml(self.path / "config.yaml")

    def status(self) -> RunStatus | None:
        """The run's status, or None when it has none yet."""
        values = read_json(self.path / "status.json")
        return None if values is None else RunStatus.from_dict(values)

    def write_status(self, status: RunStatus) -> None:
        """Replace status.json. Raises ValueError for a transition that the table does not know."""
        before = self.status()
        if before is not None and before.state is not status.state and status.state not in TRANSITIONS[before.state]:
            raise ValueError(f"{self.run_id}: {before.state} -> {status.state} is no transition of a run")
        write_atomic(self.path / "status.json", json.dumps(status.to_dict(), indent=1) + "\n", mode=0o644)

    def append_event(self, event: Mapping[str, Any]) -> None:
        """Add one line to events.jsonl; `time` is filled in where the event has none."""
        self._append("events.jsonl", {"time": time.time(), **event})

    def events(self) -> "JsonLines":
        return JsonLines(self.path / "events.jsonl")

    def metrics(self) -> "JsonLines":
        return JsonLines(self.path / "metrics.jsonl")

    def log(self, attempt: int, host: int) -> Path:
        return self.path / "logs" / str(attempt) / f"host-{host}.log"

    def request_stop(self, *, suspend: bool = False) -> None:
        """Ask the run's supervisor to checkpoint and end the run. `suspend`: it goes on when its cluster is up again."""
        (self.path / "stop").write_text(_SUSPEND if suspend else "")

    def stop_requested(self) -> bool:
        return (self.path / "stop").exists()

    def suspend_requested(self) -> bool:
        return self.stop_requested() and (self.path / "stop").read_text() == _SUSPEND

    def clear_stop_request(self) -> None:
        (self.path / "stop").unlink(missing_ok=True)

    def _append(self, name: str, value: Mapping[str, Any]) -> None:
        # One write call with O_APPEND: a line is never torn by another writer, and a crash loses at most the line being written.
        handle = os.open(self.path / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, (json.dumps(value) + "\n").encode())
        finally:
            os.close(handle)


class JsonLines:
    """The objects of a .jsonl file that grows: each iteration yields those that have come since the one before.

    A last line that is still being written is left for the next time. A line that is no JSON object is passed over: it was torn when its
    writer was killed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        """Bytes, up to the end of a line."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                if (value := _json_object(line)) is not None:
                    yield value


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def new_run_id(variant: str, now: float) -> str:
    """`<variant>-<date>-<time>-<short hash>`, for a run that the user gave no name."""
    stamp = time.strftime("%m%d-%H%M%S", time.localtime(now))
    return f"{variant}-{stamp}-{secrets.token_hex(2)}"


def find_run(root: str | Path, run: str) -> RunDirectory:
    """A run by its name below `root`, or by the path of its directory. Raises PodlaunchError when there is none."""
    for path in (Path(root) / run, Path(run)):
        directory = RunDirectory(path.absolute())
        if directory.exists():
            return directory
    raise PodlaunchError(f"no run {run!r} in {Path(root).absolute()}; `tpu train status` lists the runs there")


def list_runs(root: str | Path) -> list[RunDirectory]:
    """Every run below `root`, the newest first."""
    base = Path(root).absolute()
    found = [RunDirectory(path) for path in base.iterdir() if (path / "config.yaml").exists()] if base.is_dir() else []
    return sorted(found, key=lambda run: (run.path / "config.yaml").stat().st_mtime, reverse=True)
