"""Slices without Ray, remembered so that later commands find them: `<state>/bare/<name>.json`."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.state import private_dir, read_json, state_dir, write_atomic


@dataclass(frozen=True)
class BareSlices:
    """What was asked for."""

    config: ClusterConfig
    created: float
    """Seconds since the epoch."""


def remember(config: ClusterConfig) -> None:
    """To be called before the first request: whatever happens next, the next command finds it."""
    write_atomic(_path(config.name), json.dumps({"config": config.to_dict(), "created": time.time()}, indent=1))


def forget(name: str) -> None:
    _path(name).unlink(missing_ok=True)


def find(name: str) -> BareSlices | None:
    found = read_json(_path(name))
    return None if found is None else BareSlices(ClusterConfig.from_dict(found["config"]), found["created"])


def list_bare() -> list[BareSlices]:
    names = sorted(path.stem for path in _folder().glob("*.json"))
    return [found for name in names if (found := find(name)) is not None]


def _path(name: str) -> Path:
    return _folder() / f"{name}.json"


def _folder() -> Path:
    return private_dir(state_dir() / "bare")
