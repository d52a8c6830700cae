"""The agent of a cluster's head: keeps Ray's head with the autoscaler alive, and the companion that it was given, and ends the cluster when
nobody has used it. Ray and companion outlive their agent; the next one takes them over.

`python -m cluster.vm.head_agent HEAD_FILE` on the client's machine, where the file holds a HeadSettings; without an argument at the end of
a head VM's startup script, where the metadata server holds a VmHeadSettings.
"""

import dataclasses
import json
import logging
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from cluster.autoscaler import autoscaler_config, host_settings
from cluster.config import ClusterConfig
from cluster.heads import DASHBOARD_PORT, GCS_PORT
from cluster.logs import set_up_logging
from cluster.node_names import head_instance_id, head_vm_name
from cluster.ports import free_port, free_ports
from cluster.processes import MARKER, ProcessRecord, kill_members, spawn
from cluster.ray_env import ray_environment
from cluster.ray_http import RayHttp
from cluster.schema import build, to_plain
from cluster.secret_place import SecretPlace
from cluster.services import connect
from cluster.state import cluster_dir, logs_dir, private_dir, write_atomic
from cluster.storage import storage_environment
from cluster.token import delete_secrets
from cluster.tpu.provider import TPUProvider
from cluster.vm import metadata
from cluster.vm.autostop import watch_in_background
from cluster.vm.bundle import Bundle
from cluster.vm.companion import Beside
from cluster.vm.disk import home
from cluster.vm.host_agent import OBJECT_STORE_BYTES, Rounds
from cluster.vm.host_ray import HostRay
from cluster.vm.metadata import HEAD_ATTRIBUTE
from cluster.vm.patience import patiently

logger = logging.getLogger(__name__)

RECONCILE_LIMIT_S = 24 * 3600
"""Ray gives up a slice after 10 or 60 minutes of waiting; a queued resource may wait for hours and must not lose its place to that."""

UNWANTED_LIMIT_S = 600
"""A run that recovers asks again within seconds, and must find its place in the queue."""

HEAD_VARIABLE = "PODLAUNCH_HEAD"
"""Carried by all that descends from one Ray head: drivers of jobs leave its process group."""
TICK_S = 0.25
END_GRACE_S = 25.0
"""For Ray's head to end by itself."""
COMPANION_GRACE_S = 5.0


@dataclass(frozen=True)
class HeadSettings:
    """Where the head listens and what it reads. Ports are chosen by whoever brings the cluster up."""

    cluster: str
    instance_id: str
    ip: str
    dashboard_ip: str
    """Where the dashboard listens; loopback where only a tunnel leads to it."""
    gcs_port: int
    dashboard_port: int
    client_port: int
    metrics_port: int
    token_file: str
    autoscaler_file: str
    temp_dir: str
    storage_endpoint: str | None = None
    """URL of a Cloud Storage API; None: Google's own."""
    autostop_s: float | None = None
    """The cluster ends itself after so long without a run; None: never."""
    companion: list[str] = field(default_factory=list)
    """What is kept alive beside Ray (cluster/vm/companion.py): arguments of Python; empty: nothing."""
    dashboard_metrics_port: int = 44227
    """The default is Ray's own, of heads from before there was a port for each cluster."""

    @property
    def address(self) -> str:
        return f"{self.ip}:{self.gcs_port}"

    @property
    def dashboard_url(self) -> str:
        return f"http://{self.dashboard_ip}:{self.dashboard_port}"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "HeadSettings":
        return cls(**json.loads(text))


@dataclass(frozen=True)
class VmHeadSettings:
    """What a head VM's metadata tells its agent. Names secrets and holds none."""

    config: ClusterConfig
    bundle: Bundle
    owner: str
    """Who made the cluster, as `owner_id` tells on the client's machine; slices made by this head bear it as well."""
    token: SecretPlace
    companion: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(to_plain(self))

    @classmethod
    def from_json(cls, text: str) -> "VmHeadSettings":
        return build(cls, json.loads(text))


def head_environment(settings: HeadSettings) -> dict[str, str]:
    return (
        ray_environment(settings.token_file)
        | storage_environment(settings.storage_endpoint)
        | {
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": settings.instance_id,
            "RAY_NODE_TYPE_NAME": "head",
            "AUTOSCALER_UPDATE_INTERVAL_S": "2",
            "AUTOSCALER_METRIC_PORT": str(settings.metrics_port),
            "DASHBOARD_METRIC_PORT": str(settings.dashboard_metrics_port),
            "RAY_AUTOSCALER_RECONCILE_REQUEST_STATUS_TIMEOUT_S": str(RECONCILE_LIMIT_S),
            "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S": str(RECONCILE_LIMIT_S),
            # A slice that still waits for capacity and that no run wants any more would be filled one day and billed for nobody.
            "RAY_AUTOSCALER_PENDING_NODE_IDLE_TIMEOUT_S": str(UNWANTED_LIMIT_S),
            # Ray would ask for few slices at a time; our node provider keeps below the service's rate by itself.
            "AUTOSCALER_MAX_CONCURRENT_LAUNCHES": "1000",
            # Jobs start their supervisor with the interpreter of the head, whatever PATH says.
            "PODLAUNCH_PYTHON": sys.executable,
            HEAD_VARIABLE: settings.temp_dir,
        }
    )


def head_command(settings: HeadSettings) -> list[str]:
    return [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        f"--node-ip-address={settings.ip}",
        f"--port={settings.gcs_port}",
        "--include-dashboard=true",
        f"--dashboard-host={settings.dashboard_ip}",
        f"--dashboard-port={settings.dashboard_port}",
        f"--ray-client-server-port={settings.client_port}",
        "--dashboard-agent-listen-port=0",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--num-cpus=0",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--autoscaling-config={settings.autoscaler_file}",
        f"--temp-dir={settings.temp_dir}",
        "--include-log-monitor=false",  # it reads all logs ten times a second, to print them at a driver: ours asks for none
        "--disable-usage-stats",
    ]


def main() -> None:
    if len(sys.argv) > 1:
        _main_here(Path(sys.argv[1]))
    else:
        _main_on_vm()


def _main_here(file: Path) -> None:
    settings = HeadSettings.from_json(file.read_text(encoding="utf-8"))
    set_up_logging(f"head-{settings.cluster}", terminal=None)

    def end_cluster() -> bool:
        """By a process of its own, which ends this one first. Should it fail, this one lives, and the next look starts another."""
        logger.info("no run for %.0f s: ending the cluster", settings.autostop_s)
        argv = [sys.executable, "-m", "cluster.ending", settings.cluster]
        log = logs_dir() / f"head-{settings.cluster}.out"
        process = spawn(argv, marker=f"ending-{settings.cluster}", env=os.environ, log=log, cwd=logs_dir())
        os.waitpid(process.pid, 0)
        return False

    _serve(settings, file.parent, lambda _: end_cluster())


def _main_on_vm() -> None:
    settings = VmHeadSettings.from_json(metadata.fetch(f"instance/attributes/{HEAD_ATTRIBUTE}"))
    set_up_logging(f"head-{settings.config.name}", terminal=None)
    cluster_dir(settings.config.name)  # where the node provider tells the other processes of this head what it sees
    folder = private_dir(home() / "head")
    ending = folder / "ending"

    def end_cluster(leave: Callable[[], None]) -> bool:
        """Ray first, whose autoscaler would make slices again; the mark lets a head that is restarted meanwhile go on."""
        logger.info("no run for so long as cluster.autostop says: ending the cluster")
        ending.touch()
        leave()
        return True

    if not ending.exists():
        _serve(prepare(settings, metadata.fetch("instance/network-interfaces/0/ip").strip(), folder), folder, end_cluster)
    if ending.exists():
        patiently(lambda: end_from_vm(settings.config), patience=math.inf)


def _serve(settings: HeadSettings, folder: Path, end_cluster: Callable[[Callable[[], None]], bool]) -> None:
    """Until SIGTERM, or until nobody has used the cluster for too long and `end_cluster` has ended it; it is given what ends this."""
    ending = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ending.set())
    ray = HostRay(lambda: start_ray(settings, folder), folder, time.monotonic)
    beside = HostRay(lambda: start_companion(settings, folder), private_dir(folder / "companion"), time.monotonic, what="the companion")
    if settings.autostop_s is not None:
        http = RayHttp(settings.dashboard_url, Path(settings.token_file))
        watch_in_background(settings.autostop_s, http, time.time, lambda: end_cluster(ending.set))
    rounds = Rounds([lambda: ray.tick(may_start=True), lambda: beside.tick(may_start=bool(settings.companion))])
    while not ending.wait(TICK_S):
        rounds.next()
    beside.end(COMPANION_GRACE_S)  # first: it would take the end of Ray for a loss
    ray.end(END_GRACE_S)
    kill_members(settings.temp_dir, HEAD_VARIABLE)


def start_ray(settings: HeadSettings, folder: Path) -> ProcessRecord:
    """Start Ray's head, once nothing is left of the one before: its ports must be free, and no driver of it may work on."""
    kill_members(settings.temp_dir, HEAD_VARIABLE)
    # Ray refuses to start where this names its own address and any raylet of the machine, such as an emulated host's, belongs to that.
    (Path(settings.temp_dir) / "ray_current_cluster").unlink(missing_ok=True)
    return _spawn(head_command(settings), head_environment(settings), settings, folder)


def start_companion(settings: HeadSettings, folder: Path) -> ProcessRecord:
    beside = Beside(settings.cluster, settings.dashboard_url, Path(settings.token_file))
    env = ray_environment(settings.token_file) | storage_environment(settings.storage_endpoint) | beside.to_environment()
    return _spawn([sys.executable, *settings.companion], env, settings, folder)


def _spawn(command: Sequence[str], env: dict[str, str], settings: HeadSettings, folder: Path) -> ProcessRecord:
    logger.info("starting %s", " ".join(command))
    marker = os.environ.get(MARKER, f"head-{settings.cluster}")
    return spawn(command, marker=marker, env=env, log=logs_dir() / f"head-{settings.cluster}.out", cwd=folder)


def prepare(settings: VmHeadSettings, ip: str, folder: Path) -> HeadSettings:
    """Everything that Ray's head reads on this VM, in `folder`. At a reboot the head keeps its port, which hosts know."""
    config = settings.config
    file = folder / "head.json"
    gcs_port = HeadSettings.from_json(file.read_text(encoding="utf-8")).gcs_port if file.exists() else free_port(ip, GCS_PORT)
    client, metrics, dashboard_metrics = free_ports("", 3)  # Ray takes the last two on all interfaces
    token = patiently(lambda: settings.token.local_file(folder))
    head = HeadSettings(
        cluster=config.name,
        instance_id=head_instance_id(config.name),
        ip=ip,
        dashboard_ip=ip if config.effective_head_access == "direct" else "127.0.0.1",
        gcs_port=gcs_port,
        dashboard_port=DASHBOARD_PORT,
        client_port=client,
        metrics_port=metrics,
        dashboard_metrics_port=dashboard_metrics,
        token_file=str(token),
        autoscaler_file=str(folder / "autoscaler.yaml"),
        temp_dir=str(Path(tempfile.gettempdir()) / "ray"),
        storage_endpoint=config.storage_endpoint,
        autostop_s=config.autostop_seconds,
        companion=settings.companion,
    )
    provider = autoscaler_config(config, host_settings(config, head.address, settings.token), settings.bundle, settings.owner)
    write_atomic(Path(head.autoscaler_file), yaml.safe_dump(provider))
    write_atomic(file, head.to_json())
    return head


def end_from_vm(config: ClusterConfig) -> None:
    """Delete the cluster from its own head: slices, secrets, and this VM last. Raises PodlaunchError; called again, it goes on."""
    TPUProvider.connect(config).stop()
    services = connect(config)
    delete_secrets(services.secrets, config.name)
    services.instances.delete(config.effective_head_zone, head_vm_name(config.name))


if __name__ == "__main__":
    main()
