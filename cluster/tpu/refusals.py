"""What the zones of a cluster have refused, told by the process that asks them (Ray's autoscaler) to those that only look."""

import json
import time

from cluster.state import clusters_dir, read_json, write_atomic


def write_refusals(cluster: str, lines: list[str]) -> None:
    """A cluster that is being stopped has no folder any more, and then nobody is left to be told."""
    folder = clusters_dir() / cluster
    if folder.is_dir():
        write_atomic(folder / "refusals.json", json.dumps({"time": time.time(), "lines": lines}))


def read_refusals(cluster: str) -> tuple[float, list[str]]:
    """When they were written (seconds since the epoch) and a line for each."""
    found = read_json(clusters_dir() / cluster / "refusals.json") or {"time": 0.0, "lines": []}
    return found["time"], found["lines"]
