"""The runs of a cluster that have not ended: known without Ray, whose memory is lost with the cluster's head.

    <state>/runs/<cluster>/<run>-<hash of its directory>.json

An entry is written before a run's job is submitted, and removed by whoever writes the run's final state. It names what the next attempt
needs beside the run directory, and holds no secret. It stays when the cluster is stopped with its runs kept.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.secret_place import SecretPlace
from cluster.state import private_dir, read_json, state_dir, write_atomic
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

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.run_directory)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Entry":
        place = values.get("secrets")
        return cls(**{**values, "secrets": None if place is None else SecretPlace.from_dict(place)})


class RunIndex:
    """Several processes write it: each entry is a file of its own, replaced at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def entries(self) -> list[Entry]:
        found = [read_json(path) for path in sorted(self.folder.glob("*.json"))]
        return [Entry.from_dict(values) for values in found if values is not None]  # None: removed a moment ago

    def find(self, run: RunDirectory) -> Entry | None:
        values = read_json(self._path(run))
        return None if values is None else Entry.from_dict(values)

    def write(self, entry: Entry) -> None:
        private_dir(self.folder)
        write_atomic(self._path(entry.run), json.dumps(dataclasses.asdict(entry), indent=1))

    def forget(self, run: RunDirectory) -> None:
        """The run has ended: its secrets and its entry go, in this order. Raises PodlaunchError when a secret cannot be deleted."""
        entry = self.find(run)
        if entry is not None and entry.secrets is not None:
            entry.secrets.delete()
        self._path(run).unlink(missing_ok=True)

    def suspend(self, run: RunDirectory) -> None:
        """The run goes on some day: its secrets go, its entry stays."""
        entry = self.find(run)
        if entry is not None and entry.secrets is not None:
            entry.secrets.delete()
            self.write(dataclasses.replace(entry, secrets=None))

    def _path(self, run: RunDirectory) -> Path:
        digest = hashlib.sha256(run.url.encode()).hexdigest()[:8]
        return self.folder / f"{run.run_id}-{digest}.json"


def index_folder(cluster: str) -> Path:
    """Not in the cluster's own folder, which is deleted when the cluster is stopped."""
    return state_dir() / "runs" / cluster


def index_of(cluster: str) -> RunIndex:
    return RunIndex(index_folder(cluster))


def keeper_command(config: ClusterConfig) -> list[str]:
    """What a head runs beside Ray (arguments of the head's own Python), so that its runs outlive it. Empty where no run can be started:
    heads that do not see this machine's files.
    """
    return ["-m", "launcher.gang.keeper", str(index_folder(config.name))] if config.on_this_machine else []
