"""`tpu stop`: end a cluster; nothing of it is left, neither process nor slice."""

from typing import Annotated

import typer

from cluster import clusters
from cluster.clusters import Cluster
from cluster.errors import PodlaunchError
from launcher import app, jobs
from launcher.cli.options import CONSOLE, ERRORS, confirm
from launcher.runs import FINAL, RunDirectory, RunState


def stop(
    name: Annotated[str | None, typer.Argument(help="The cluster; needed only when there are several.")] = None,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
) -> None:
    """End a cluster: its runs, its slices, its head."""
    cluster = _which(name)
    if cluster is None:
        CONSOLE.print("no cluster is up", highlight=False)
        return
    runs = unfinished_runs(cluster)
    for run in runs:
        CONSOLE.print(f"unfinished run: {run.path}", highlight=False, soft_wrap=True)
    confirm(f"Stop cluster {cluster.name!r}{f' and its {len(runs)} unfinished runs' if runs else ''}?", yes)
    clusters.stop(cluster, lambda text: ERRORS.print(text, highlight=False))
    for run in runs:
        app.end_orphan(run, RunState.STOPPED, f"cluster {cluster.name!r} was stopped")
    CONSOLE.print(f"cluster {cluster.name!r} is stopped", highlight=False)


def unfinished_runs(cluster: Cluster) -> list[RunDirectory]:
    """The cluster's runs that have no final state yet."""
    if not cluster.alive():
        return []
    found = [RunDirectory(path) for path in jobs.run_directories(cluster)]
    return [run for run in found if (status := run.status()) is not None and status.state not in FINAL and status.cluster == cluster.name]


def _which(name: str | None) -> Cluster | None:
    known = clusters.list_clusters()
    if name is None and len(known) > 1:
        raise PodlaunchError(f"several clusters are up, name one: {', '.join(cluster.name for cluster in known)}")
    if name is None:
        return known[0] if known else None
    found = clusters.find(name)
    if found is None:
        names = ", ".join(cluster.name for cluster in known) or "none"
        raise PodlaunchError(f"there is no cluster {name!r}; up: {names}")
    return found
