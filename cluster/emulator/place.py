"""The folder of an emulated cloud, as its clients on this machine know it: where its daemon answers, and who may be that."""

import dataclasses
import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster import processes
from cluster.emulator.profile import DEFAULT_PROFILE
from cluster.emulator.storage import storage_marker
from cluster.errors import ClusterError
from cluster.processes import ProcessRecord
from cluster.state import private_dir, read_json, write_atomic


@dataclass(frozen=True)
class Endpoint:
    """How a running daemon is reached."""

    grpc: str
    """host:port of the Cloud TPU and Secret Manager APIs over gRPC."""
    rest: str
    """URL of the same APIs and of Compute Engine over REST; empty for a daemon of an earlier version."""
    admin: str
    """URL of its admin endpoint; empty for a daemon of an earlier version."""
    profile: str
    """Which of the profiles says how long it takes."""
    process: ProcessRecord
    image_bundle: str
    """The hash of the bundle in the image of its hosts; empty: a bare image."""
    storage: str = ""
    """URL of its Cloud Storage; empty where that is not installed."""


def read_endpoint(folder: Path) -> Endpoint | None:
    """The daemon that serves `folder` now; None when there is none."""
    values = read_json(folder / "endpoint.json")
    if values is None:
        return None
    found = Endpoint(
        values["grpc"],
        values.get("rest", ""),
        values.get("admin", ""),
        values.get("profile", DEFAULT_PROFILE),
        ProcessRecord.from_dict(values["process"]),
        values["image_bundle"],
        values.get("storage", ""),
    )
    return found if found.process.alive() else None


@contextmanager
def only_one(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the folder's lock, which goes with the process. Raises ClusterError when somebody else holds it for `patience` seconds.

    A daemon that was killed a moment ago is dead for everybody and holds it still, until the kernel has taken its threads apart.
    """
    deadline = time.monotonic() + patience
    with (private_dir(folder) / "lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    words = f"another emulated cloud runs on {folder}; use it, or stop it first with: tpu emulator stop"
                    raise ClusterError(words) from None
            time.sleep(0.02)  # a lock cannot be waited for with a limit
        yield


def end_storage(folder: Path) -> None:
    """End the object storage that a dead daemon left."""
    processes.kill_members(storage_marker(folder))


def daemon_marker(folder: Path) -> str:
    """By what a daemon that was started for `folder` is known."""
    return f"emulator-{folder}"


def write_endpoint(folder: Path, endpoint: Endpoint) -> None:
    write_atomic(folder / "endpoint.json", json.dumps(dataclasses.asdict(endpoint)))
