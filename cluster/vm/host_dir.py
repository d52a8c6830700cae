"""The folder in which a host's agent and the runner of a run on that host meet; it belongs to this host alone.

notice.json    while the cloud takes the host away: {kind, time, deadline}
ray.json       the host's `ray start`, so that a new agent finds what the one before it started
companion.json what runs want beside Ray on this host from now on: arguments of Python
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from cluster.processes import ProcessRecord
from cluster.state import private_dir, read_json, write_atomic
from cluster.vm.disk import home

HOST_DIR_VARIABLE = "PODLAUNCH_HOST_DIR"
"""Set for Ray on a host, and so for every worker of it."""


class NoticeKind(StrEnum):
    """Why the host goes away."""

    PREEMPTED = "preempted"
    MAINTENANCE = "maintenance"


@dataclass(frozen=True)
class Notice:
    """The cloud takes the host away. Times are seconds since the epoch."""

    kind: NoticeKind
    time: float
    """When it was seen."""
    deadline: float
    """When the host ends, as far as that is known."""


def write_notice(folder: Path, notice: Notice | None) -> None:
    """Replaced at once; None takes it back."""
    path = folder / "notice.json"
    if notice is None:
        path.unlink(missing_ok=True)
    else:
        write_atomic(path, json.dumps(asdict(notice)))


def read_notice(folder: Path) -> Notice | None:
    values = read_json(folder / "notice.json")
    return None if values is None else Notice(NoticeKind(values["kind"]), float(values["time"]), float(values["deadline"]))


def write_companion(folder: Path, arguments: Sequence[str]) -> None:
    """The agent knows nothing of what it does, and keeps it alive while Ray is up."""
    write_atomic(folder / "companion.json", json.dumps(list(arguments)))


def read_companion(folder: Path) -> list[str]:
    """Empty when nobody has asked for one."""
    path = folder / "companion.json"
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []


def write_ray(folder: Path, record: ProcessRecord | None) -> None:
    path = folder / "ray.json"
    if record is None:
        path.unlink(missing_ok=True)
    else:
        write_atomic(path, json.dumps(asdict(record)))


def living_ray(folder: Path) -> ProcessRecord | None:
    """The `ray start` that an agent before this one left running."""
    values = read_json(folder / "ray.json")
    record = None if values is None else ProcessRecord.from_dict(values)
    return record if record is not None and record.alive() else None


def host_dir() -> Path:
    """This host's folder, created where missing."""
    return private_dir(home() / "host")
