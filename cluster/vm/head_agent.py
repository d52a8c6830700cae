"""The agent of a cluster's head: starts Ray's head with the autoscaler and keeps it alive.

`python -m cluster.vm.head_agent HEAD_FILE`, where the file holds a HeadSettings.
"""

import dataclasses
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from cluster.logs import set_up_logging
from cluster.ray_env import ray_environment
from cluster.vm.host_agent import OBJECT_STORE_BYTES
from cluster.vm.ray_process import run_until_sigterm

logger = logging.getLogger(__name__)

RECONCILE_LIMIT_S = 24 * 3600
"""Ray gives up a slice after 10 or 60 minutes of waiting; a queued resource may wait for hours and must not lose its place to that."""

UNWANTED_LIMIT_S = 600
"""A run that recovers asks again within seconds, and must find its place in the queue."""


@dataclass(frozen=True)
class HeadSettings:
    """Where the head listens and what it reads. Ports are chosen by whoever brings the cluster up."""

    cluster: str
    instance_id: str
    ip: str
    gcs_port: int
    dashboard_port: int
    client_port: int
    metrics_port: int
    token_file: str
    autoscaler_file: str
    temp_dir: str

    @property
    def address(self) -> str:
        return f"{self.ip}:{self.gcs_port}"

    @property
    def dashboard_url(self) -> str:
        return f"http://{self.ip}:{self.dashboard_port}"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)


def head_environment(settings: HeadSettings) -> dict[str, str]:
    return ray_environment(settings.token_file) | {
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": settings.instance_id,
        "RAY_NODE_TYPE_NAME": "head",
        "AUTOSCALER_UPDATE_INTERVAL_S": "2",
        "AUTOSCALER_METRIC_PORT": str(settings.metrics_port),
        "RAY_AUTOSCALER_RECONCILE_REQUEST_STATUS_TIMEOUT_S": str(RECONCILE_LIMIT_S),
        "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S": str(RECONCILE_LIMIT_S),
        # A slice that still waits for capacity and that no run wants any more would be filled one day and billed for nobody.
        "RAY_AUTOSCALER_PENDING_NODE_IDLE_TIMEOUT_S": str(UNWANTED_LIMIT_S),
        # Ray would ask for few slices at a time; our node provider keeps below the service's rate by itself.
        "AUTOSCALER_MAX_CONCURRENT_LAUNCHES": "1000",
        # Jobs start their supervisor with the interpreter of the head, whatever PATH says.
        "PODLAUNCH_PYTHON": sys.executable,
    }


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
        f"--dashboard-host={settings.ip}",
        f"--dashboard-port={settings.dashboard_port}",
        f"--ray-client-server-port={settings.client_port}",
        "--dashboard-agent-listen-port=0",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--num-cpus=0",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--autoscaling-config={settings.autoscaler_file}",
        f"--temp-dir={settings.temp_dir}",
        "--disable-usage-stats",
    ]


def main() -> None:
    settings = HeadSettings(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    set_up_logging(f"head-{settings.cluster}", terminal=None)
    run_until_sigterm(head_command(settings), head_environment(settings))


if __name__ == "__main__":
    main()
