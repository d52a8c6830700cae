"""The companion of a head: a command that whoever brings the cluster up hands over, and that the head's agent keeps alive beside Ray.

The agent knows nothing of what it does. It tells it by its environment which cluster it belongs to and where the head answers.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CLUSTER_VARIABLE = "PODLAUNCH_CLUSTER"
URL_VARIABLE = "PODLAUNCH_DASHBOARD"
_TOKEN_VARIABLE = "RAY_AUTH_TOKEN_PATH"


@dataclass(frozen=True)
class Beside:
    """The head that a companion is beside."""

    cluster: str
    url: str
    """Where its dashboard and its job server answer."""
    token_file: Path

    def to_environment(self) -> dict[str, str]:
        return {CLUSTER_VARIABLE: self.cluster, URL_VARIABLE: self.url, _TOKEN_VARIABLE: str(self.token_file)}

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> "Beside":
        """Raises KeyError where no agent started this process."""
        return cls(env[CLUSTER_VARIABLE], env[URL_VARIABLE], Path(env[_TOKEN_VARIABLE]))
