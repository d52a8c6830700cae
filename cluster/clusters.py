"""The clusters of this user: brought up, found by name, ended whole. The head runs on this machine.

A cluster is found by its record `<state>/clusters/<name>/cluster.json`; its slices are created by the node provider on the head alone.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster import bare as bare_slices
from cluster import existing, local
from cluster.autoscaler import autoscaler_config, host_settings, node_type
from cluster.config import ClusterConfig
from cluster.errors import ClusterError
from cluster.node_names import head_instance_id
from cluster.processes import ProcessRecord, end, spawn
from cluster.ray_env import ray_environment
from cluster.ray_http import RayHttp
from cluster.state import cluster_dir, clusters_dir, logs_dir, read_json, short_dir, write_atomic
from cluster.tpu.provider import TPUProvider
from cluster.vm.bootstrap import startup_script
from cluster.vm.bundle import bundle_hash
from cluster.vm.head_agent import HeadSettings

logger = logging.getLogger(__name__)

HEAD_START_LIMIT_S = 120.0
"""A head needs 6 to 12 s on two idle cores; a busy machine may need several times that."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Cluster:
    """A cluster that was brought up: what a client needs to use it."""

    config: ClusterConfig
    head: HeadSettings
    process: ProcessRecord
    bundle: str
    created: float

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def token_file(self) -> Path:
        return Path(self.head.token_file)

    @property
    def http(self) -> RayHttp:
        return RayHttp(self.head.dashboard_url, self.token_file)

    def provider(self) -> TPUProvider:
        return TPUProvider.connect(self.config)

    def alive(self) -> bool:
        return self.process.alive()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Cluster":
        return cls(
            config=ClusterConfig.from_dict(values["config"]),
            head=HeadSettings(**values["head"]),
            process=ProcessRecord.from_dict(values["process"]),
            bundle=values["bundle"],
            created=values["created"],
        )


def find(name: str) -> Cluster | None:
    """The cluster of that name, alive or not, or None when there is none."""
    record = read_json(clusters_dir() / name / "cluster.json")
    return None if record is None else Cluster.from_dict(record)


def list_clusters() -> list[Cluster]:
    names = sorted(path.parent.name for path in clusters_dir().glob("*/cluster.json"))
    return [cluster for name in names if (cluster := find(name)) is not None]


def check_name(name: str, *, bare: bool) -> None:
    """Raises ClusterError when slices without Ray use the cluster's name, or, with `bare`, a cluster uses theirs: both would call the
    same slices their own.
    """
    if bare and find(name) is not None:
        raise ClusterError(f"a cluster {name!r} is up; choose another name, or end it with `tpu stop {name}`")
    if not bare and bare_slices.find(name) is not None:
        raise ClusterError(f"slices without Ray called {name!r} are up; choose another cluster.name, or end them with `tpu stop {name}`")


def check_fits(cluster: Cluster, wanted: ClusterConfig) -> None:
    """Raises ClusterError when the running cluster cannot serve `wanted`."""
    has, wants = node_type(cluster.config), node_type(wanted)
    advice = f"choose another cluster.name, or end it with `tpu stop {cluster.name}`"
    if has != wants:
        raise ClusterError(f"cluster {cluster.name!r} is up with slices of {has}, this asks for {wants}; {advice}")
    if missing := sorted(set(wanted.existing) - set(cluster.config.existing)):
        raise ClusterError(f"cluster {cluster.name!r} is up without the existing slices {', '.join(missing)}; {advice}")
    most = cluster.config.effective_max_slices
    if wanted.slices > most:
        raise ClusterError(f"cluster {cluster.name!r} is up with at most {most} slices, this asks for {wanted.slices}; {advice}")


def up(config: ClusterConfig, progress: Progress) -> Cluster:
    """The cluster of `config`, brought up when it is not. Two callers at once get the same one.

    Raises ClusterError when it cannot be brought up, or is up and cannot serve `config`.
    """
    with _exclusive(config.name):
        check_name(config.name, bare=False)
        cluster = find(config.name)
        if cluster is not None and cluster.alive():
            check_fits(cluster, config)
            _revive_cloud(cluster)
            _wait_until_ready(cluster)
            _attach(cluster, progress)
            return cluster
        if cluster is not None:
            progress(f"the head of cluster {config.name!r} is gone: cleaning up after it")
            _remove(cluster)
        cluster = _start(config, progress)
        _attach(cluster, progress)
        return cluster


def stop(cluster: Cluster, progress: Progress) -> None:
    """End the cluster: its slices, its head, and the emulated cloud when nothing else uses it."""
    with _exclusive(cluster.name):
        _remove(cluster, progress)


def _start(config: ClusterConfig, progress: Progress) -> Cluster:
    if config.cloud != "emulated":
        raise ClusterError(
            f"cluster {config.name!r}: the head of a cluster on Google Cloud is a VM, which this version cannot make yet; "
            "use cluster=local, or make slices without Ray with `tpu start --bare`"
        )
    bundle = bundle_hash()
    progress("starting the emulated cloud")
    config = local.with_local_endpoints(config, bundle)
    existing.check(TPUProvider.connect(config))  # before anything is started
    folder = cluster_dir(config.name)
    head = _head_settings(config, folder)
    settings = host_settings(config, head.address, Path(head.token_file))
    write_atomic(Path(head.token_file), secrets.token_hex(32))
    write_atomic(Path(head.autoscaler_file), yaml.safe_dump(autoscaler_config(config, settings, bundle)))
    write_atomic(folder / "head.json", head.to_json())
    progress("starting the head of the Ray cluster")
    process = spawn(
        [sys.executable, "-m", "cluster.vm.head_agent", str(folder / "head.json")],
        marker=f"head-{config.name}-{secrets.token_hex(4)}",
        env={**ray_environment(head.token_file), "PYTHONSAFEPATH": "1"},
        log=logs_dir() / f"head-{config.name}.out",
        cwd=folder,
    )
    cluster = Cluster(config, head, process, bundle, time.time())
    # Recorded before it is ready: whatever happens next, the next start or stop finds it.
    write_atomic(folder / "cluster.json", json.dumps(cluster.to_dict(), indent=1))
    _wait_until_ready(cluster)
    return cluster


def _attach(cluster: Cluster, progress: Progress) -> None:
    """Let the slices join that were made elsewhere. When that fails the cluster is up without them; the next `tpu start` tries again."""
    if not cluster.config.existing:
        return
    progress("letting the existing slices join")
    settings = host_settings(cluster.config, cluster.head.address, cluster.token_file)
    joined = [node.slice_name for node in cluster.http.nodes() if node.alive]
    existing.attach(cluster.provider(), settings, startup_script(cluster.bundle), joined)


def _head_settings(config: ClusterConfig, folder: Path) -> HeadSettings:
    ip = _head_ip(folder)
    gcs, dashboard, client, metrics = _free_ports(ip, 4)
    return HeadSettings(
        cluster=config.name,
        instance_id=head_instance_id(config.name),
        ip=ip,
        gcs_port=gcs,
        dashboard_port=dashboard,
        client_port=client,
        metrics_port=metrics,
        token_file=str(folder / "token"),
        autoscaler_file=str(folder / "autoscaler.yaml"),
        temp_dir=str(short_dir(folder)),
    )


def _head_ip(folder: Path) -> str:
    """A loopback address of the cluster's own; 127.0.0.1 itself is rewritten by Ray to the machine's address."""
    return f"127.{16 + hashlib.sha256(str(folder).encode()).digest()[0] % 224}.0.1"


def _free_ports(ip: str, count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind((ip, 0))
        return [int(listener.getsockname()[1]) for listener in sockets]


def _wait_until_ready(
    cluster: Cluster, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> None:
    deadline = clock() + HEAD_START_LIMIT_S
    log = logs_dir() / f"head-{cluster.name}.out"
    while not cluster.http.answers():
        if not cluster.alive():
            raise ClusterError(f"the head of cluster {cluster.name!r} ended while it started; see {log}")
        if clock() > deadline:
            raise ClusterError(f"the head of cluster {cluster.name!r} does not answer after {HEAD_START_LIMIT_S:.0f} s; see {log}")
        sleep(0.2)


def _revive_cloud(cluster: Cluster) -> None:
    """An emulated service that crashed comes back with its nodes, at the same address."""
    if cluster.config.cloud == "emulated":
        local.ensure_emulator(cluster.bundle)


def _remove(cluster: Cluster, progress: Progress = lambda _: None) -> None:
    _revive_cloud(cluster)
    existing.detach(cluster.provider(), progress)
    # The head first, else its autoscaler makes the slices again that are being deleted.
    progress("stopping the head")
    end(cluster.process)
    progress("deleting the slices")
    cluster.provider().stop()
    others = [c for c in list_clusters() if c.name != cluster.name and c.config.cloud == cluster.config.cloud]
    if cluster.config.cloud == "emulated" and not others and not cluster.config.existing:  # which end with it, and are not ours to end
        progress("stopping the emulated cloud")
        local.stop_emulator()
    shutil.rmtree(cluster.head.temp_dir, ignore_errors=True)
    shutil.rmtree(clusters_dir() / cluster.name)


@contextlib.contextmanager
def _exclusive(name: str) -> Iterator[None]:
    """One starter or stopper of a cluster at a time."""
    handle = os.open(clusters_dir() / f".{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
