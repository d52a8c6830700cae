"""The file that Ray's autoscaler reads on the head: node types, limits, and what our node provider needs."""

import dataclasses
from typing import Any

from cluster.config import ClusterConfig
from cluster.existing import existing_type
from cluster.schema import to_plain
from cluster.secret_place import SecretPlace
from cluster.versions import own_versions
from cluster.vm.bundle import Bundle
from cluster.vm.settings import HostSettings

HEAD_TYPE = "head"
NEVER_IDLE_MINUTES = 10_000_000


def node_type(config: ClusterConfig) -> str:
    """Ray's name for the cluster's kind of slice, for example `v4-16` or `v6e-8-spot`."""
    return config.kind


def slice_resource(config: ClusterConfig) -> str:
    """The resource of which worker 0 of each such slice has one: asking for it is asking for a slice of this kind."""
    return f"podlaunch-slice-{node_type(config)}"


def host_settings(config: ClusterConfig, head_address: str, token: SecretPlace) -> HostSettings:
    """To be called on the head, or by a client that agrees with it."""
    return HostSettings(
        cluster=config.name,
        head_address=head_address,
        token=token,
        node_type=node_type(config),
        slice_resource=slice_resource(config),
        chips_per_host=config.accelerator.chips_per_host,
        endpoint=config.endpoint,
        storage_endpoint=config.storage_endpoint,
        spot=config.provisioning == "spot",
        head_lost_grace_s=config.head_lost_grace_seconds,
        versions=own_versions(),
    )


def settings_of_type(settings: HostSettings, config: ClusterConfig) -> HostSettings:
    """What the hosts of one of the cluster's types are told, by what those of its own type are told."""
    return dataclasses.replace(
        settings,
        node_type=node_type(config),
        slice_resource=slice_resource(config),
        chips_per_host=config.accelerator.chips_per_host,
        spot=config.provisioning == "spot",
    )


def autoscaler_config(config: ClusterConfig, settings: HostSettings, bundle: Bundle, owner: str) -> dict[str, Any]:
    """`bundle`: what hosts run. `owner`: who makes the slices, as `owner_id` tells.

    Every legacy key stands here although empty: autoscaler v2 dies without them and takes the head with it.
    """
    most = sum(kind.effective_max_slices for kind in config.types)
    idle = config.idle_minutes if config.idle_minutes is not None else NEVER_IDLE_MINUTES
    return {
        "cluster_name": config.name,
        "max_workers": most,
        "idle_timeout_minutes": idle,
        "upscaling_speed": float(most),  # times what runs already: all that a run wants at once, since it cannot begin with less
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
            **{node_type(kind): _available_type(kind) for kind in config.types},
            **_existing_type(config),
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


def _available_type(config: ClusterConfig) -> dict[str, Any]:
    """Slices that were made elsewhere are a type of their own, which Ray finds in the first listing and never asks for or ends: every one
    of them is there, none is idle for long enough, and the resource that nobody wants makes it the last to be chosen.
    """
    return {
        "resources": _resources(config),
        "labels": _labels(config),
        "node_config": {},
        "min_workers": max(0, config.min_slices - len(config.existing)),
        "max_workers": config.effective_max_slices - len(config.existing),
    }


def _resources(config: ClusterConfig) -> dict[str, int]:
    """Of worker 0, which stands for the slice."""
    kind = config.accelerator
    return {"CPU": kind.chips_per_host, "TPU": kind.chips_per_host, f"TPU-{kind.name}-head": 1, slice_resource(config): 1}


def _labels(config: ClusterConfig) -> dict[str, str]:
    kind = config.accelerator
    return {"ray.io/tpu-worker-id": "0", "ray.io/tpu-pod-type": kind.name, "ray.io/tpu-topology": kind.topology}


def _existing_type(config: ClusterConfig) -> dict[str, Any]:
    if not config.existing:
        return {}
    return {
        existing_type(node_type(config)): {
            "resources": {**_resources(config), "podlaunch-existing": 1},
            "labels": _labels(config),
            "node_config": {},
            "min_workers": 0,
            "max_workers": len(config.existing),
            "idle_timeout_s": NEVER_IDLE_MINUTES * 60,
        }
    }
