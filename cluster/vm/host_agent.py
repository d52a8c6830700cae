"""The agent of one TPU host: learns who it is, joins the host to its Ray cluster, and keeps it there.

Runs as the end of the VM's startup script: `python -m cluster.vm.host_agent`. Nobody reaches a host by SSH to set it up.
"""

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from cluster.logs import set_up_logging
from cluster.ray_env import ray_environment
from cluster.vm import metadata
from cluster.vm.metadata import HostIdentity
from cluster.vm.ray_process import run_until_sigterm
from cluster.vm.settings import HostSettings

logger = logging.getLogger(__name__)

SETTINGS_VARIABLE = "PODLAUNCH_HOST_SETTINGS"
"""Holds the settings on a host whose metadata is not ours: a TPU VM that was made elsewhere."""
OBJECT_STORE_BYTES = 128 * 2**20
"""Runs move their data through files, not through Ray's object store; Ray's default would claim 30 % of the memory."""


def host_environment(identity: HostIdentity, settings: HostSettings, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a host's Ray processes; from the four TPU_ variables Ray derives its TPU resources and labels."""
    env = ray_environment(settings.token_file, base)
    env |= {
        "TPU_NAME": identity.slice_name,
        "TPU_WORKER_ID": str(identity.worker_id),
        "TPU_ACCELERATOR_TYPE": identity.accelerator_type,
        "TPU_TOPOLOGY": identity.topology,
    }
    if identity.worker_id == 0:
        # One autoscaler instance is one slice: Ray links it to exactly one node, and that is worker 0.
        env |= {"RAY_CLOUD_INSTANCE_ID": identity.slice_name, "RAY_NODE_TYPE_NAME": settings.node_type}
    return env


def ray_start_command(identity: HostIdentity, settings: HostSettings, temp_dir: Path) -> list[str]:
    """The `ray start` of this host."""
    resources = f'{{"TPU": {settings.chips_per_host}'
    if identity.worker_id == 0:
        resources += f', "{settings.slice_resource}": 1'
    return [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--block",
        f"--address={settings.head_address}",
        f"--node-ip-address={identity.ip}",
        f"--temp-dir={temp_dir}",
        f"--resources={resources}}}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-agent-listen-port=0",
        "--disable-usage-stats",
    ]


def read_settings(env: Mapping[str, str], fetch: Callable[[str], str]) -> HostSettings:
    """From the environment where whoever started the agent put them there, else from the node's metadata."""
    given = env.get(SETTINGS_VARIABLE)
    return HostSettings.from_dict(json.loads(given) if given is not None else metadata.read_settings(fetch))


def main() -> None:
    identity = metadata.read_identity(metadata.fetch)
    settings = read_settings(os.environ, metadata.fetch)
    set_up_logging(f"host-{identity.slice_name}-{identity.worker_id}", terminal=None)
    logger.info("host %d of slice %s, cluster %s", identity.worker_id, identity.slice_name, settings.cluster)
    temp_dir = Path(tempfile.gettempdir()) / "ray"  # as short as can be: a socket's path is limited to 107 bytes
    run_until_sigterm(ray_start_command(identity, settings, temp_dir), host_environment(identity, settings))


if __name__ == "__main__":
    main()
