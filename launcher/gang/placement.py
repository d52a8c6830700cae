"""Which hosts make the gang, in which order, and what each training process is told about the others."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SLICE_LABEL = "ray.io/tpu-slice-name"
WORKER_LABEL = "ray.io/tpu-worker-id"


@dataclass(frozen=True)
class Host:
    """One host of the gang, as Ray knows it."""

    slice_name: str
    worker_id: int
    ip: str
    node_id: str

    @property
    def name(self) -> str:
        return f"{self.slice_name}/{self.worker_id}"

    @property
    def selector(self) -> dict[str, str]:
        """The label selector that places a bundle on this host and nowhere else."""
        return {SLICE_LABEL: self.slice_name, WORKER_LABEL: str(self.worker_id)}


def living_hosts(nodes: Iterable[Mapping[str, Any]], slices: Iterable[str]) -> list[Host]:
    """The living hosts of these slices, ordered by slice and worker id. `nodes` is what `ray.nodes()` returns."""
    wanted = set(slices)
    hosts = [
        Host(labels[SLICE_LABEL], int(labels[WORKER_LABEL]), node["NodeManagerAddress"], node["NodeID"])
        for node in nodes
        if node["Alive"] and (labels := node.get("Labels") or {}).get(SLICE_LABEL) in wanted and WORKER_LABEL in labels
    ]
    return sorted(hosts, key=lambda host: (host.slice_name, host.worker_id))


def dead(hosts: Iterable[Host], nodes: Iterable[Mapping[str, Any]]) -> list[Host]:
    """Those of `hosts` that do not live for Ray any more; one that has come back since is another node. `nodes` is as above."""
    alive = {node["NodeID"] for node in nodes if node["Alive"]}
    return [host for host in hosts if host.node_id not in alive]


def incomplete(hosts: Sequence[Host], slices: Iterable[str], hosts_per_slice: int) -> list[str]:
    """Those of `slices` that do not have exactly their hosts, each once."""
    expected = list(range(hosts_per_slice))
    return [name for name in slices if sorted(host.worker_id for host in hosts if host.slice_name == name) != expected]


def process_environment(hosts: Sequence[Host], index: int, port: int, megascale_port: int) -> dict[str, str]:
    """What process `index` of the gang is told: computed anew at each attempt, never taken from an old environment.

    `port` is free on the first host; with several slices `megascale_port` is the coordinator's port for traffic between slices.
    """
    coordinator, count = f"{hosts[0].ip}:{port}", str(len(hosts))
    env = {
        "PODLAUNCH_COORDINATOR": coordinator,
        "PODLAUNCH_NUM_PROCESSES": count,
        "PODLAUNCH_PROCESS_ID": str(index),
        # For programs that are not ours. JAX itself reads the first, and asks launcher/training/jax_cluster.py for the others.
        "JAX_COORDINATOR_ADDRESS": coordinator,
        "JAX_NUM_PROCESSES": count,
        "JAX_PROCESS_ID": str(index),
    }
    slices = sorted({host.slice_name for host in hosts})
    if len(slices) > 1:
        env |= {
            "MEGASCALE_COORDINATOR_ADDRESS": f"{hosts[0].ip}:{megascale_port}",
            "MEGASCALE_NUM_SLICES": str(len(slices)),
            "MEGASCALE_SLICE_ID": str(slices.index(hosts[index].slice_name)),
        }
    return env
