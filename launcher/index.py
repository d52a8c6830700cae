"""The runs of a cluster that have not ended: known without Ray, whose memory is lost with the cluster's head.

    <state>/runs/<cluster>/<run>-<hash of its directory>.json           where head and hosts are on this machine
    gs://<bucket>/runs/index/<cluster>/<the same>                       on Google Cloud

An entry is written before a run's job is submitted, and removed by whoever writes the run's final state. It names what the next attempt
needs beside the run directory, and holds no secret. It stays when the cluster is stopped with its runs kept.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.config import ClusterConfig
from cluster.secret_place import SecretPlace
from cluster.state import state_dir
from launcher.run_files import open_files
from launcher.runs import RunDirectory


@dataclass(frozen=True)
class Entry:
    """One run of the cluster."""

    run_directory: str
    secrets: SecretPlace | None = None
    """Where the values are that the run was given; None when it was given none, or its cluster was stopped."""
    secret_names: list[str] = field(default_factory=list)
    lives: int = 0
    """How many supervisors were lost in a row without the run getting any further."""
    best_step: int = 0
    """The furthest step that any attempt had done when its supervisor was lost."""
    submitted_at: float = 0.0
    """When its last supervisor was submitted, in seconds since the epoch."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Entry":
        place = values.get("secrets")
        return cls(**{**values, "secrets": None if place is None else SecretPlace.from_dict(place)})


class RunIndex:
    """Several processes write it: each entry is a file of its own, replaced at once. Methods raise OSError or CloudError."""

    def __init__(self, url: str, endpoint: str | None = None) -> None:
        """`endpoint`: as for Bucket, for gs:// only."""
        self.url, self._files, self._endpoint = url, open_files(url, endpoint), endpoint

    @property
    def poll_s(self) -> float:
        """How long to wait between two looks, in seconds."""
        return self._files.least_interval_s

    def entries(self) -> list[Entry]:
        found = [self._read(name) for name in self._files.list("") if name.endswith(".json") and not name.startswith(".")]
        return [entry for entry in found if entry is not None]  # None: removed a moment ago

    def run(self, entry: Entry) -> RunDirectory:
        return RunDirectory(entry.run_directory, self._endpoint)

    def find(self, run: RunDirectory) -> Entry | None:
        return self._read(_name(run.url))

    def write(self, entry: Entry) -> None:
        self._files.write(_name(entry.run_directory), json.dumps(dataclasses.asdict(entry), indent=1).encode())

    def forget(self, run: RunDirectory) -> None:
        """The run has ended: its secrets and its entry go, in this order. Raises PodlaunchError when a secret cannot be deleted."""
        entry = self.find(run)
        if entry is not None and entry.secrets is not None:
            entry.secrets.delete()
        self._files.remove(_name(run.url))

    def suspend(self, run: RunDirectory) -> None:
        """The run goes on some day: its secrets go, its entry stays."""
        entry = self.find(run)
        if entry is not None and entry.secrets is not None:
            entry.secrets.delete()
            self.write(dataclasses.replace(entry, secrets=None))

    def _read(self, name: str) -> Entry | None:
        content = self._files.read(name)
        return None if content is None else Entry.from_dict(json.loads(content))


def _name(url: str) -> str:
    """Of a run's entry: two runs of one name may be in two places."""
    return f"{url.rpartition('/')[2]}-{hashlib.sha256(url.encode()).hexdigest()[:8]}.json"


def index_url(config: ClusterConfig) -> str:
    """Where the index of a cluster is, as its head finds it too. Not in the cluster's own folder, which is deleted when it is stopped."""
    if config.on_this_machine or config.bucket is None:
        return str(state_dir() / "runs" / config.name)
    return f"gs://{config.bucket}/runs/index/{config.name}"


def index_of(config: ClusterConfig) -> RunIndex:
    return RunIndex(index_url(config), config.storage_endpoint)


def keeper_command(config: ClusterConfig) -> list[str]:
    """What a head runs beside Ray (arguments of the head's own Python), so that its runs outlive it."""
    return ["-m", "launcher.gang.keeper", index_url(config)]
