"""The head of a cluster, wherever it runs: on this machine (cluster/head_here.py) or as a Compute Engine VM (cluster/head.py)."""

from collections.abc import Callable
from typing import Any, Protocol

Progress = Callable[[str], None]

DASHBOARD_PORT = 8265
"""Where the dashboard of a head VM listens; Ray's own default."""
GCS_PORT = 6379
"""Where hosts find Ray's head on a VM; Ray's own default."""


class Head(Protocol):
    """Made from a configuration by `plan`, or from its record by `from_dict`; nothing is created before `start`."""

    @property
    def kind(self) -> str:
        """`here` or `vm`, as in the configuration."""

    @property
    def ready_limit_s(self) -> float:
        """How long it may take from `start` until jobs can be submitted."""

    @property
    def url(self) -> str:
        """Where its dashboard and job server are reached from this machine; opens the way there. Raises PodlaunchError."""

    @property
    def ray_address(self) -> str:
        """host:port where hosts find Ray's head. Raises PodlaunchError."""

    @property
    def log_hint(self) -> str:
        """Where to look when it does not come up."""

    def show_url(self) -> str:
        """The same for a display: opens nothing, says how to open it instead. Raises PodlaunchError."""

    def start(self, progress: Progress) -> None:
        """Create it and return when it exists, which is before it answers. Called again after an interruption, it goes on."""

    def alive(self) -> bool:
        """Whether it exists and runs, or will soon. Raises PodlaunchError when nobody can tell."""

    def stop(self, progress: Progress) -> None:
        """End it; returns when nothing of it is left, whatever there was."""

    def let_go(self) -> None:
        """End what this machine keeps to reach it."""

    def to_dict(self) -> dict[str, Any]:
        """What the cluster's record holds of it."""
