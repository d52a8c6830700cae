"""What several verbs share."""

import sys

import typer
from rich.console import Console

from cluster import clusters
from cluster.errors import ConfigError
from launcher.runs import RunDirectory, find_run

CONSOLE = Console()
ERRORS = Console(stderr=True)


def confirm(question: str, yes: bool) -> None:
    """Ask before something that costs or destroys. Raises ConfigError (exit code 2) where nobody can be asked."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError(f"{question} Nobody can be asked here: say -y to go ahead")
    if not typer.confirm(question):
        raise typer.Exit(1)


def locate_run(run: str, root: str) -> RunDirectory:
    return find_run(root, run)


def cluster_of(run: RunDirectory) -> clusters.Cluster | None:
    """The cluster that the run is on, when it is still there."""
    status = run.status()
    return None if status is None else clusters.find(status.cluster)
