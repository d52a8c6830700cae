"""The file that Ray's autoscaler reads on the head: node types, limits, and what our node provider needs."""

from typing import Any

from cluster.config import ClusterConfig
from cluster.schema import to_plain
from cluster.secret_place import SecretPlace
from cluster.vm.bundle import Bundle
from cluster.vm.settings import HostSettings

HEAD_TYPE = "head"
NEVER_IDLE_MINUTES = 10_000_000


def node_type(config: ClusterConfig) -> str:
    """Ray's name for the cluster's kind of slice, for example `v4-16` or `v6e-8-spot`."""
    suffix = "" if config.provisioning == "on-demand" else f"-{config.provisioning}"
    return f"{config.accelerator.name}{suffix}"


def slice_resource(config: ClusterConfig) -> str:
    """The resource of which worker 0 of each such slice has one: asking for it is asking for a slice of this kind."""
    return f"podlaunch-slice-{node_type(config)}"


def host_settings(config: ClusterConfig, head_address: str, token: SecretPlace) -> HostSettings:
    return HostSettings(
        cluster=config.name,
        head_address=head_address,
        token=token,
        node_type=node_type(config),
        slice_resource=slice_resource(config),
        chips_per_host=config.accelerator.chips_per_host,
    )


def autoscaler_config(config: ClusterConfig, settings: HostSettings, bundle: Bundle, owner: str) -> dict[str, Any]:
    """`bundle`: what hosts run. `owner`: who makes the slices, as `owner_id` tells.

    Every legacy key stands here although empty: autoscaler v2 dies without them and takes the head with it.
    """
    kind = config.accelerator
    most = config.effective_max_slices
    idle = config.idle_minutes if config.idle_minutes is not None else NEVER_IDLE_MINUTES
    return {
        "cluster_name": config.name,
        "max_workers": most,
        "idle_timeout_minutes": idle,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": "cluster.node_provider.SliceNodeProvider",
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "cluster": to_plain(config),
            "host_settings": settings.to_json(),
            "bundle": bundle.to_dict(),
            "owner": owner,
        },
        "auth": {},
        "head_node_type": HEAD_TYPE,
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 0}, "labels": {}, "node_config": {}, "min_workers": 0, "max_workers": 0},
            node_type(config): {
                "resources": {
                    "CPU": kind.chips_per_host,
                    "TPU": kind.chips_per_host,
                    f"TPU-{kind.name}-head": 1,
                    slice_resource(config): 1,
                },
                "labels": {"ray.io/tpu-worker-id": "0", "ray.io/tpu-pod-type": kind.name, "ray.io/tpu-topology": kind.topology},
                "node_config": {},
                "min_workers": config.min_slices,
                "max_workers": most,
            },
        },
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
        "initialization_commands": [],
        "file_mounts": {},
        "cluster_synced_files": [],
        "rsync_exclude": [],
        "rsync_filter": [],
        "docker": {},
    }
