"""The environment of Ray's processes: authentication always on, nothing of the caller's leaking in."""

import os
from collections.abc import Mapping
from pathlib import Path

# Ray's own variables, and those that would make a process take itself for another node or another slice.
_NEVER_INHERITED = ("RAY_", "MEGASCALE_", "TPU_")
_OWN_RAY_SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A user's own cluster.py or conf/ in the working directory must not shadow our packages.
    "PYTHONSAFEPATH": "1",
    # Ray renames its processes; without this the new name overwrites the environment that marks whose they are.
    "SPT_NOENV": "1",
    # Ray lowers the priority of its workers by 15, and training runs in a child of one: anything else on the machine would go first.
    "RAY_worker_niceness": "0",
    # The runner decides what its training process sees of the accelerators.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def ray_environment(token_file: Path | str, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """`base` (default: this process's environment) without what must not leak, with the cluster's authentication."""
    source = os.environ if base is None else base
    clean = {key: value for key, value in source.items() if not key.startswith(_NEVER_INHERITED)}
    return {**clean, **_OWN_RAY_SETTINGS, "RAY_AUTH_TOKEN_PATH": str(token_file)}
