"""JAX learns where it runs: a plain `jax.distributed.initialize()` in a user's program finds the other processes of the run.

JAX asks one `ClusterEnv` after another (Slurm, Open MPI, GKE, ...) whether it knows the place; ours answers from the environment that
launcher/gang/placement.py makes for every attempt. It is made known when the program imports JAX and not before: what a program sets
before its `import jax` (JAX_PLATFORMS, JAX_ENABLE_X64) has to hold.
"""

import os
from typing import Any

import wrapt

from launcher.training.coordinator import await_coordinator

COORDINATOR, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_CLUSTERS = "jax._src.clusters"  # JAX publishes no other name for it; the version is pinned


def introduce_to_jax() -> None:
    """Have the run's own cluster environment known to JAX as soon as that is imported."""
    wrapt.register_post_import_hook(_register, _CLUSTERS)


def _register(clusters: Any) -> None:
    class PodlaunchCluster(clusters.ClusterEnv):  # type: ignore[misc]  # known at run time only
        """The processes of a run."""

        name = "podlaunch"

        @classmethod
        def is_env_present(cls) -> bool:
            return PROCESS in os.environ

        @classmethod
        def get_coordinator_address(cls, timeout_secs: int | None, override_coordinator_port: str | None) -> str:  # noqa: ARG003  # JAX's
            if cls.get_process_id() > 0:
                await_coordinator(os.environ[COORDINATOR])
            return os.environ[COORDINATOR]

        @classmethod
        def get_process_count(cls) -> int:
            return int(os.environ[PROCESSES])

        @classmethod
        def get_process_id(cls) -> int:
            return int(os.environ[PROCESS])

    known = clusters.ClusterEnv._cluster_types  # in the order in which they are asked; JAX has just put ours last
    known.remove(PodlaunchCluster)
    known.insert(0, PodlaunchCluster)
