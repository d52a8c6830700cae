"""`tpu stop`: end a cluster; nothing of it is left, neither process nor slice."""

from typing import Annotated

import typer

from cluster import bare, clusters, local
from cluster.clusters import Cluster
from cluster.errors import ClusterError, PodlaunchError
from cluster.tpu.api import TpuApi
from cluster.tpu.orphans import delete_orphan
from cluster.tpu.provider import TPUProvider
from cluster.vm.bundle import bundle_hash
from launcher import app, jobs
from launcher.cli.options import CONSOLE, ERRORS, confirm
from launcher.cli.places import orphans_everywhere
from launcher.runs import FINAL, RunDirectory, RunState


def stop(
    name: Annotated[str | None, typer.Argument(help="The cluster; needed only when there are several.")] = None,
    orphans: Annotated[bool, typer.Option("--orphans", help="Delete the slices that no cluster owns, instead of a cluster.")] = False,
    any_owner: Annotated[bool, typer.Option("--any-owner", help="With --orphans: also those that another machine or user made.")] = False,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
) -> None:
    """End a cluster: its runs, its slices, its head."""
    if orphans:
        _stop_orphans(any_owner=any_owner, yes=yes)
        return
    without_ray = _bare(name)
    if without_ray is not None:
        _stop_bare(without_ray, yes=yes)
        return
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


def _stop_orphans(*, any_owner: bool, yes: bool) -> None:
    problems: list[str] = []
    everything = orphans_everywhere(problems.append)
    found = [(place, orphan) for place, orphan in everything if orphan.ours or any_owner]
    for _, orphan in found:
        CONSOLE.print(f"{orphan.item.name} in {orphan.item.zone}, of cluster {orphan.cluster!r}: {orphan.item.state}", highlight=False)
    if len(found) < len(everything):
        text = f"{len(everything) - len(found)} more were made by another machine or user; --any-owner deletes them as well"
        ERRORS.print(text, highlight=False, soft_wrap=True)
    if found:
        confirm(f"Delete these {len(found)} slices?", yes)
    for (endpoint, project), orphan in found:
        api = TpuApi(endpoint, project)
        delete_orphan(api, orphan)
        api.close()
    CONSOLE.print(f"{len(found)} slices are being deleted" if found else "there are no orphans", highlight=False)
    if problems:
        raise ClusterError("\n".join(problems))


def _bare(name: str | None) -> bare.BareSlices | None:
    """The slices without Ray that are meant: named, or the only thing there is."""
    if name is not None:
        return bare.find(name)
    found = bare.list_bare()
    return found[0] if len(found) == 1 and not clusters.list_clusters() else None


def _stop_bare(slices: bare.BareSlices, *, yes: bool) -> None:
    config = slices.config
    confirm(f"Stop the slices of {config.name!r}?", yes)
    if config.cloud == "emulated":
        config = local.with_local_endpoints(config, bundle_hash())
    count = TPUProvider.connect(config).stop()
    bare.forget(config.name)
    configs = [cluster.config for cluster in clusters.list_clusters()] + [one.config for one in bare.list_bare()]
    if config.cloud == "emulated" and not any(other.cloud == "emulated" for other in configs):
        local.stop_emulator()
    CONSOLE.print(f"{config.name!r} is stopped, with its {count} slices", highlight=False)


def unfinished_runs(cluster: Cluster) -> list[RunDirectory]:
    """The cluster's runs that have no final state yet."""
    if not cluster.alive():
        return []
    found = [RunDirectory(path) for path in jobs.run_directories(cluster)]
    return [run for run in found if (status := run.status()) is not None and status.state not in FINAL and status.cluster == cluster.name]


def _which(name: str | None) -> Cluster | None:
    known = clusters.list_clusters()
    names = [cluster.name for cluster in known] + [one.config.name for one in bare.list_bare()]
    if name is None and len(names) > 1:
        raise PodlaunchError(f"several clusters are up, name one: {', '.join(names)}")
    if name is None:
        return known[0] if known else None
    found = clusters.find(name)
    if found is None:
        raise PodlaunchError(f"there is no cluster {name!r}; up: {', '.join(names) or 'none'}")
    return found
