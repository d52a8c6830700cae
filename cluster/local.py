"""The emulated cloud of this machine: started when it is needed, found again by every later command, ended on request."""

import dataclasses
import json
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import processes
from cluster.config import ClusterConfig
from cluster.emulator.place import Endpoint, daemon_marker, end_storage, only_one, read_endpoint
from cluster.emulator.profile import DEFAULT_PROFILE
from cluster.emulator.storage import NOT_INSTALLED
from cluster.errors import ClusterError
from cluster.processes import ProcessRecord
from cluster.state import emulator_dir, logs_dir

_LOG = "emulator-output.log"


@dataclass(frozen=True)
class LocalEndpoints:
    """Where the services of the emulated cloud answer."""

    grpc: str
    """host:port of the Cloud TPU and Secret Manager APIs over gRPC."""
    rest: str
    """URL of the same APIs and of Compute Engine over REST."""
    storage: str
    """URL of Cloud Storage; empty where that is not installed."""


@dataclass(frozen=True)
class EmulatorStatus:
    """The emulated cloud that runs now."""

    endpoint: str
    """host:port of its Cloud TPU API over gRPC."""
    rest: str
    """URL of the same API over REST."""
    admin: str
    """URL of its admin endpoint."""
    profile: str
    pid: int
    started: float
    """Seconds since the epoch."""
    image_bundle: str
    storage: str
    """URL of its Cloud Storage; empty where that is not installed."""


def with_local_endpoints(config: ClusterConfig, bundle_hash: str) -> ClusterConfig:
    """`config` with the addresses of the emulated cloud, started where it does not run.

    With a bucket, hosts install what they need, so a cloud that runs is used whatever its image holds.

    Raises ClusterError as ensure_emulator does, and when there is a bucket and no object storage.
    """
    running = emulator_status() if config.bucket is not None else None
    found = ensure_emulator(bundle_hash if running is None else running.image_bundle)
    if config.bucket is not None and not found.storage:
        raise ClusterError(
            f"cluster {config.name!r} has the bucket {config.bucket!r}, and the emulated cloud's object storage is {NOT_INSTALLED}"
        )
    return dataclasses.replace(
        config, endpoint=found.grpc, secrets_endpoint=found.grpc, compute_endpoint=found.rest, storage_endpoint=found.storage or None
    )


def ensure_emulator(
    bundle_hash: str,
    *,
    profile: str | None = None,
    timeout: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> LocalEndpoints:
    """Where the emulated cloud answers, started where it does not run.

    `bundle_hash` is what its hosts' image holds; empty: nothing. A daemon with another image is replaced; its nodes live on, new hosts get
    the new image.
    `profile`: how long it takes; None keeps that of the daemon that runs. One with another profile is replaced in the same way.
    `timeout`: seconds. Raises ClusterError, with the end of the daemon's output, when it does not come up.
    """
    folder = emulator_dir()
    found = read_endpoint(folder)
    wanted = profile or (found.profile if found is not None else DEFAULT_PROFILE)
    if found is not None and (found.image_bundle, found.profile) == (bundle_hash, wanted) and _accepts(found.grpc):
        return LocalEndpoints(found.grpc, found.rest, found.storage)
    if found is not None:
        processes.end(found.process)
    record = _spawn(folder, bundle_hash, wanted)
    deadline = clock() + timeout
    while clock() < deadline:
        found = read_endpoint(folder)
        if found is not None and _accepts(found.grpc):  # ours, or that of another command that was faster
            return LocalEndpoints(found.grpc, found.rest, found.storage)
        processes.reap(record)
        if not record.alive() and not _another_starts(folder):
            raise ClusterError(f"the emulated cloud ended at once: {_tail()}")
        sleep(0.02)
    processes.end(record)
    raise ClusterError(f"the emulated cloud did not serve within {timeout:.0f} s: {_tail()}")


def emulator_status() -> EmulatorStatus | None:
    """The emulated cloud that runs now, if any."""
    found = read_endpoint(emulator_dir())
    if found is None:
        return None
    process = found.process
    return EmulatorStatus(
        found.grpc, found.rest, found.admin, found.profile, process.pid, process.started, found.image_bundle, found.storage
    )


def ask_emulator(verb: str, path: str, values: Mapping[str, Any] | None = None, *, timeout: float = 30.0) -> Any:
    """One request to the admin endpoint of the emulated cloud that runs; cluster.emulator.admin lists what there is.

    Returns the JSON answer. Raises ClusterError when none runs, and with its words when it refuses.
    """
    found = emulator_status()
    if found is None or not found.admin:
        raise ClusterError("no emulated cloud runs; start one with: tpu emulator start")
    body = json.dumps(values).encode() if values is not None else None
    request = urllib.request.Request(found.admin + path, data=body, method=verb)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback: never through a proxy
    try:
        with opener.open(request, timeout=timeout) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            raise ClusterError(f"the emulated cloud refuses: {json.loads(error.read())['error']['message']}") from error
    except OSError as error:
        raise ClusterError(f"the emulated cloud does not answer at {found.admin}: {error}") from error


def host_environment(node: str, worker: int) -> tuple[dict[str, str], Path]:
    """The environment and the folder that a process of an emulated host starts with. `node`: its path, or its id where that is clear.

    Raises ClusterError as ask_emulator does.
    """
    found = ask_emulator("POST", "/environment", {"node": node, "worker": worker})
    return found["env"], Path(found["cwd"])


def stop_emulator(*, delete_nodes: bool = True) -> bool:
    """End the emulated cloud; with `delete_nodes` also all of its nodes and hosts, whether or not it runs.

    Returns whether there was anything to end. Raises TimeoutError when a process does not end.
    """
    folder = emulator_dir()
    found: Endpoint | None = read_endpoint(folder)
    if found is not None:
        processes.end(found.process)
        (folder / "endpoint.json").unlink(missing_ok=True)
    from cluster.emulator.daemon import purge  # the services themselves, which no other command needs

    end_storage(folder)
    nodes = purge(folder) if delete_nodes else 0
    return found is not None or nodes > 0


def _spawn(folder: Path, bundle_hash: str, profile: str) -> ProcessRecord:
    argv = [sys.executable, "-P", "-m", "cluster.emulator", "--state-dir", str(folder), "--image-bundle", bundle_hash, "--profile", profile]
    (logs_dir() / _LOG).unlink(missing_ok=True)  # the tail must be of this start
    return processes.spawn(argv, marker=daemon_marker(folder), env=_environment(os.environ), log=logs_dir() / _LOG, cwd=folder)


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    """Ours, with this package on Python's path: in a checkout that is not installed nothing else leads to it from another folder."""
    root = str(Path(__file__).parents[1])
    return {**env, "PYTHONPATH": os.pathsep.join(filter(None, [root, env.get("PYTHONPATH", "")]))}


def _accepts(endpoint: str) -> bool:
    """Whether somebody listens there: a daemon that was killed a moment ago still looks alive in the table of processes."""
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except OSError:
        return False
    return True


def _another_starts(folder: Path) -> bool:
    """Whether somebody else's daemon holds the folder, which is why ours ended."""
    try:
        with only_one(folder):
            return False
    except ClusterError:
        return True


def _tail() -> str:
    """Where the daemon's output is, and its last line."""
    path = logs_dir() / _LOG
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    said = [line.strip() for line in lines if line.strip()]
    return f"{said[-1] if said else 'it said nothing'}; see {path}"
