"""What several verbs share."""

import sys
from typing import Annotated

import typer
from rich.console import Console

from cluster import clusters
from cluster.errors import ConfigError
from cluster.storage import Bucket, split_url
from launcher.run_files import is_object
from launcher.runs import RunDirectory, find_run

CONSOLE = Console()
ERRORS = Console(stderr=True)
DEFAULT_ROOT = "runs"
Root = Annotated[str, typer.Option("--root", help="The place that holds run directories: a folder, or gs://<bucket>/<folder>.")]
Run = Annotated[str, typer.Argument(help="A run's name, or the path of its directory.")]
_PATIENCE_S = 5.0


def confirm(question: str, yes: bool) -> None:
    """Ask before something that costs or destroys. Raises ConfigError (exit code 2) where nobody can be asked."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError(f"{question} Nobody can be asked here: say -y to go ahead")
    if not typer.confirm(question):
        raise typer.Exit(1)


def locate_run(run: str, root: str) -> RunDirectory:
    return find_run(root, run, storage_endpoint(run if is_object(run) else root))


def storage_endpoint(url: str) -> str | None:
    """Where the bucket of a gs:// URL is served: by the storage of a cluster that is known here, or (None) by Google."""
    if not is_object(url):
        return None
    bucket, _ = split_url(url)
    known = dict.fromkeys(config.storage_endpoint for one in clusters.list_clusters() if (config := one.config).storage_endpoint)
    return next((endpoint for endpoint in known if Bucket(bucket, endpoint, patience=_PATIENCE_S).there()), None)


def cluster_of(run: RunDirectory) -> clusters.Cluster | None:
    """The cluster that the run is on, when it is still there."""
    status = run.status()
    return None if status is None else clusters.find(status.cluster)
