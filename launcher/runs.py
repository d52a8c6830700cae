"""The run directory: the only truth about a run. One writer and one reader for everything that is in it.

    <run.root>/<run_id>/
      config.yaml  code.zip  data.zip  status.json  events.jsonl  metrics.jsonl  samples.jsonl
      logs/<attempt>/host-<i>.log (.times, and .stacks of one that hung)  checkpoints/<step>/  export/  tensorboard/
      programs/              compiled already, by `tpu train check` (launcher/programs.py)
      claims/<attempt>.json  whose attempt it is (launcher/claims.py)
      stop                   present once somebody asked the run to stop; it holds how (StopRequest)
      profile                present while somebody waits for a profile; profiles/ holds them (launcher/profiles.py)

The command line, the dashboard and outside scripts read it; only whoever holds the newest claim (the run's supervisor, or who submits or
ends the run in its place) writes status.json and events.jsonl, and only process 0 of the training gang writes metrics.jsonl and
samples.jsonl. On gs:// the files that grow (*.jsonl, logs) are folders of segments, see run_files.py.
"""

import json
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import ConfigError, PodlaunchError
from cluster.storage import PATIENCE_S
from cluster.yaml_files import parse_settings
from launcher.config import LaunchConfig
from launcher.goodput import Phase
from launcher.log_times import times_of, written_before
from launcher.profiles import REQUEST, ProfileRequest, traces_of
from launcher.run_files import LocalFiles, RunRoot, Tail, is_object, open_files

SAMPLES = "samples.jsonl"
"""Texts that the model wrote, one a line."""
DATA = "data.zip"
"""The user's training data, where the hosts do not see the machine that it is on."""
ALONE = "-"
"""In place of a cluster's name in the status of a run in one process (launcher/alone.py)."""
_LOG = re.compile(r"(\d+)/host-(\d+)\.log")


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


class StopRequest(StrEnum):
    """What the file `stop` of a run directory asks for."""

    SAVE = "save"
    """Checkpoint and end."""
    NOW = "now"
    """End without a checkpoint."""
    SUSPEND = "suspend"
    """Checkpoint and end, to go on when the cluster is up again."""


FINAL = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.STOPPED})
AT_REST = FINAL | {RunState.SUSPENDED}
"""Nobody works on the run, nor will without being asked."""

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
    """What status.json holds. Times are seconds since the epoch; `phases` and `costs` are seconds and US dollars by launcher.goodput.Phase,
    over all attempts since `started_at`.
    """

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
    """Of the newest evaluation after a step."""
    held_out_parts: dict[str, float] = field(default_factory=dict)
    """The same of each part of a mixture, by its name."""
    checkpoint: int | None = None
    started_at: float = 0.0
    updated_at: float = 0.0
    ended_at: float | None = None
    reason: str | None = None
    first_failure: FirstFailure | None = None
    phases: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    highest_step: int = 0
    """`step` goes back after a rollback, this does not."""
    job: str | None = None
    spent: dict[str, int] = field(default_factory=dict)
    """How much of each of run.budget is spent, by cause, since a person last asked for the run."""
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

    def after(self, before: "RunStatus") -> "RunStatus":
        """This status of a run that is taken up again, with what stays from `before`, when it had ended."""
        return replace(
            self,
            step=before.step,
            recoveries=before.recoveries,
            held_out_before=before.held_out_before,
            checkpoint=before.checkpoint,
            cost_usd=before.cost_usd,
            started_at=before.started_at,
            phases=before.phases,
            costs=before.costs,
            highest_step=before.highest_step,
            quiet_at=before.quiet_at,
        )

    @property
    def unwatched(self) -> Phase:
        """What a run in this state is doing while no supervisor accounts for it."""
        if self.state is RunState.QUEUED:
            return Phase.STARTING
        return Phase.IDLE if self.state in AT_REST else Phase.RECOVERING

    def accounted_until(self, now: float) -> "RunStatus":
        """With the time since the last update, in which no supervisor wrote."""
        missing = max(0.0, now - self.updated_at)
        phases = {**self.phases, self.unwatched: round(self.phases.get(self.unwatched, 0.0) + missing, 3)}
        return replace(self, phases=phases, updated_at=now)


def check_transition(run_id: str, before: RunState, after: RunState) -> None:
    """Raises ValueError for one that the table does not know; a state may always stay what it is."""
    if before is not after and after not in TRANSITIONS[before]:
        raise ValueError(f"{run_id}: {before} -> {after} is no transition of a run")


class RunDirectory:
    """One run's folder: a local one, or one below gs://. Methods raise OSError or CloudError when the place does not answer."""

    def __init__(self, url: str | Path, endpoint: str | None = None, patience: float | None = PATIENCE_S) -> None:
        """`endpoint` and `patience`: as for Bucket, for gs:// only."""
        self.files = open_files(url, endpoint, patience)
        self.url = self.files.url

    @property
    def run_id(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def path(self) -> Path:
        """Of a local one."""
        assert isinstance(self.files, LocalFiles), self.url
        return self.files.folder

    @property
    def checkpoints(self) -> str:
        """Where they are: a local path or gs://."""
        return f"{self.url}/checkpoints"

    @property
    def poll_s(self) -> float:
        """How long to wait between two looks, or two replacements of the status, in seconds."""
        return self.files.least_interval_s

    def exists(self) -> bool:
        return self.files.read("config.yaml") is not None

    def create(self, config: LaunchConfig) -> None:
        """Make the folder and write its config.yaml. Raises ConfigError when the place is not writable."""
        try:
            self.files.write("config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False).encode())
        except OSError as error:
            advice = "choose another place with run.root=<folder>"
            raise ConfigError(f"cannot write the run directory {self.url}: {error.strerror}; {advice}") from error

    def config(self) -> LaunchConfig:
        """Raises ConfigError, also when there is none."""
        content = self.files.read("config.yaml")
        if content is None:
            raise ConfigError(f"{self.url} has no config.yaml")
        return LaunchConfig.from_dict(parse_settings(content, f"{self.url}/config.yaml"))

    def read_code(self) -> bytes:
        """The run's code.zip. Raises PodlaunchError when there is none."""
        content = self.files.read("code.zip")
        if content is None:
            raise PodlaunchError(f"{self.url} has no code.zip")
        return content

    def write_code(self, content: bytes) -> None:
        self.files.write("code.zip", content)

    def status(self) -> RunStatus | None:
        """The run's status, or None when it has none yet."""
        content = self.files.read("status.json")
        return None if content is None else RunStatus.from_dict(json.loads(content))

    def write_status(self, status: RunStatus) -> None:
        """Replace status.json. Raises ValueError for a transition that the table does not know."""
        before = self.status()
        if before is not None:
            check_transition(self.run_id, before.state, status.state)
        self.replace_status(status)

    def replace_status(self, status: RunStatus) -> None:
        """The same for who knows what stands there."""
        self.files.write("status.json", (json.dumps(status.to_dict(), indent=1) + "\n").encode())

    def append_event(self, event: Mapping[str, Any]) -> None:
        """Add one line to events.jsonl; `time` is filled in where the event has none."""
        self.files.append("events.jsonl", (json.dumps({"time": time.time(), **event}) + "\n").encode())

    def events(self) -> "JsonLines":
        return JsonLines(self.files.tail("events.jsonl"))

    def metrics(self) -> "JsonLines":
        return JsonLines(self.files.tail("metrics.jsonl"))

    def samples(self) -> "JsonLines":
        return JsonLines(self.files.tail(SAMPLES))

    def log_name(self, attempt: int, host: int) -> str:
        """Of the file that one training process writes to."""
        return f"logs/{attempt}/host-{host}.log"

    def write_stacks(self, attempt: int, host: int, stacks: str) -> None:
        """Where a training process hung."""
        self.files.write(f"logs/{attempt}/host-{host}.stacks", stacks.encode())

    def read_log(self, attempt: int, host: int) -> bytes:
        """What that training process has written so far."""
        return self.files.read_grown(self.log_name(attempt, host))

    def tail_log(self, attempt: int, host: int) -> Tail:
        """The same, as it grows."""
        return self.files.tail(self.log_name(attempt, host))

    def log_length(self, attempt: int, host: int, moment: float) -> int:
        """So many bytes of it were there at `moment`, seconds since the epoch."""
        return written_before(self.files.read_grown(times_of(Path(self.log_name(attempt, host))).as_posix()), moment)

    def logs(self) -> dict[int, list[int]]:
        """Attempt -> the hosts that wrote a log in it, both in order."""
        found: dict[int, list[int]] = {}
        for name in self.files.list("logs"):
            if (parts := _LOG.fullmatch(name)) is not None:
                found.setdefault(int(parts[1]), []).append(int(parts[2]))
        return {attempt: sorted(found[attempt]) for attempt in sorted(found)}

    def request_stop(self, how: StopRequest = StopRequest.SAVE) -> None:
        """Ask the run's supervisor to end the run."""
        self.files.write("stop", how.encode())

    def stop_requested(self) -> StopRequest | None:
        content = self.files.read("stop")
        if content is None:
            return None
        text = content.decode(errors="replace").strip()
        return StopRequest(text) if text in tuple(StopRequest) else StopRequest.SAVE

    def request_profile(self, request: ProfileRequest) -> bool:
        """False when somebody else waits for one."""
        return self.files.create(REQUEST, request.to_json().encode())

    def profile_requested(self) -> ProfileRequest | None:
        content = self.files.read(REQUEST)
        try:
            return None if content is None else ProfileRequest.from_json(content)
        except ValueError:
            return None

    def clear_profile_request(self) -> None:
        self.files.remove(REQUEST)

    def traces(self, request: ProfileRequest) -> list[str]:
        """The names of the hosts' traces that are there."""
        return [name for name in self.files.list(traces_of(request.id)) if name.endswith(".xplane.pb")]

    def write_data(self, archive: bytes) -> None:
        self.files.write(DATA, archive)

    def clear_stop_request(self) -> None:
        self.files.remove("stop")


class JsonLines:
    """The objects of a .jsonl file that grows: each iteration yields those that have come since the one before.

    A last line that is still being written is left for the next time. A line that is no JSON object is passed over: it was torn when its
    writer was killed.
    """

    def __init__(self, tail: Tail) -> None:
        self._tail = tail

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in self._tail():
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


def find_run(root: str | Path, run: str, endpoint: str | None = None) -> RunDirectory:
    """A run by its name below `root`, or by the place of its directory. Raises PodlaunchError when there is none.

    `endpoint`: as for Bucket, for gs:// only.
    """
    base = RunRoot(root, endpoint).url
    places = [run] if is_object(run) else [f"{base}/{run}", str(Path(run).absolute())]
    for place in places:
        directory = RunDirectory(place, endpoint)
        if directory.exists():
            return directory
    raise PodlaunchError(f"no run {run!r} in {base}; `tpu train status` lists the runs there")


def list_runs(root: str | Path, endpoint: str | None = None) -> list[RunDirectory]:
    """Every run below `root`, the newest first. `endpoint`: as for Bucket, for gs:// only."""
    base = RunRoot(root, endpoint)
    return [RunDirectory(f"{base.url}/{name}", endpoint) for name in base.names()]
