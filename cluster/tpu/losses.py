"""Which slices the cloud has taken back and how the others stand, told by the process that lists them (Ray's autoscaler) to those that ask
why a host is gone or what a run waits for.

The file's modification time is when the last listing began, so that a reader knows whether the listing is younger than what it asks about.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from cluster.state import clusters_dir, read_json, write_atomic
from cluster.tpu.lifecycle import Life
from cluster.tpu.slices import ClusterSlice

_STANDING = "slices.json"

KEPT = 1000
"""So many are remembered; a run asks within seconds."""


class Losses:
    """The writer's side. One listing after the other."""

    def __init__(self, cluster: str) -> None:
        self._cluster = cluster
        self._lost = read_losses(cluster)[1]
        self._standing: dict[str, list[str]] | None = None

    def take(self, slices: Iterable[ClusterSlice], began: float) -> None:
        """From a listing that began at `began`, seconds since the epoch."""
        slices = list(slices)
        found = {item.name: item.state for item in slices if item.taken and self._lost.get(item.name) != item.state}
        self._lost = dict([*self._lost.items(), *found.items()][-KEPT:])
        path = _path(self._cluster)
        if not path.parent.is_dir():
            return  # the cluster is being stopped
        if found or not path.exists():
            write_atomic(path, json.dumps(self._lost))
        os.utime(path, (began, began))
        standing = {item.name: [item.accelerator_type, item.life.value] for item in slices}
        if standing != self._standing:
            write_atomic(path.with_name(_STANDING), json.dumps(standing))
            self._standing = standing


def read_losses(cluster: str) -> tuple[float, dict[str, str]]:
    """When the last listing began (seconds since the epoch; 0 when there was none), and the state in which each lost slice was seen."""
    path = _path(cluster)
    found = read_json(path)
    return (0.0, {}) if found is None else (path.stat().st_mtime, found)


def read_standing(cluster: str) -> dict[str, tuple[str, Life]]:
    """The accelerator type of each slice of the last listing, and where it is in its life."""
    found = read_json(_path(cluster).with_name(_STANDING)) or {}
    return {name: (kind, Life(life)) for name, (kind, life) in found.items()}


def read_ready(cluster: str) -> dict[str, str]:
    """The accelerator type of each slice that the last listing showed READY: its machines run, whether or not they have joined Ray."""
    return {name: kind for name, (kind, life) in read_standing(cluster).items() if life is Life.READY}


def _path(cluster: str) -> Path:
    return clusters_dir() / cluster / "losses.json"
