"""`tpu stop`: end a cluster; nothing of it is left, neither process nor slice. Its runs are over, or suspended with --keep-runs."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from cluster import bare, clusters, local
from cluster.clusters import Cluster
from cluster.errors import ClusterError, PodlaunchError
from cluster.tpu.provider import TPUProvider
from cluster.vm.bundle import bundle_hash
from launcher import jobs
from launcher.attempts import end_run
from launcher.cli.options import CONSOLE, ERRORS, confirm
from launcher.cli.places import clusters_elsewhere, orphans_everywhere
from launcher.index import index_of
from launcher.runs import AT_REST, FINAL, RunDirectory, RunState, StopRequest
from launcher.watch import looked_after

logger = logging.getLogger(__name__)

SUSPEND_LIMIT_S = 150.0
"""For all runs to checkpoint and end: what a supervisor gives its processes for that (120 s), and a moment."""


def stop(
    name: Annotated[str | None, typer.Argument(help="The cluster; needed only when there are several.")] = None,
    orphans: Annotated[
        bool, typer.Option("--orphans", help="Delete slices, head VMs and secrets that no cluster owns, instead of a cluster.")
    ] = False,
    any_owner: Annotated[bool, typer.Option("--any-owner", help="With --orphans: also those that another machine or user made.")] = False,
    keep_runs: Annotated[
        bool, typer.Option("--keep-runs", help="Let its runs checkpoint; they go on when a cluster of this name is up again.")
    ] = False,
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
    cluster = which(name, ended=True)
    if cluster is None:
        CONSOLE.print("no cluster is up", highlight=False)
        return
    if cluster.ended is not None:
        clusters.stop(cluster, lambda text: ERRORS.print(text, highlight=False))
        CONSOLE.print(f"cluster {cluster.name!r} is {cluster.ended}; its record is removed", highlight=False)
        return
    runs = unfinished_runs(cluster)
    state = RunState.SUSPENDED if keep_runs else RunState.STOPPED
    for run in runs:
        CONSOLE.print(f"unfinished run, will be {state}: {run.url}", highlight=False, soft_wrap=True)
    confirm(f"Stop cluster {cluster.name!r}{f' and its {len(runs)} unfinished runs' if runs else ''}?", yes)
    if keep_runs and looked_after(cluster):
        suspend(runs, lambda text: ERRORS.print(text, highlight=False, soft_wrap=True, markup=False))
    for run in runs:  # before the head goes: nobody who follows them is left without a word, and no keeper takes them up
        end_run(run, state, f"cluster {cluster.name!r} was stopped", index_of(cluster.config))
    clusters.stop(cluster, lambda text: ERRORS.print(text, highlight=False))
    for run in runs if keep_runs else ():
        CONSOLE.print(f"{_state(run)}: {run.url}", highlight=False, soft_wrap=True)
    CONSOLE.print(f"cluster {cluster.name!r} is stopped", highlight=False)


def suspend(
    runs: Sequence[RunDirectory],
    say: Callable[[str], None],
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Ask the runs to checkpoint and wait until they have ended, or for `SUSPEND_LIMIT_S`."""
    waiting = [run for run in runs if _state(run) not in AT_REST]
    for run in waiting:
        run.request_stop(StopRequest.SUSPEND)
    if waiting:
        say(f"waiting for {len(waiting)} runs to checkpoint")
    deadline = clock() + SUSPEND_LIMIT_S
    while (waiting := [run for run in waiting if _state(run) not in AT_REST]) and clock() < deadline:
        sleep(0.2)  # another process's file
    for run in waiting:
        say(f"run {run.url} did not checkpoint within {SUSPEND_LIMIT_S:.0f} s; it will go on from an earlier checkpoint")


def _state(run: RunDirectory) -> RunState | None:
    status = run.status()
    return None if status is None else status.state


def _stop_orphans(*, any_owner: bool, yes: bool) -> None:
    problems: list[str] = []
    everything = orphans_everywhere(problems.append)
    found = everything if any_owner else [orphans.only_ours() for orphans in everything]
    for orphans in found:
        for slice_ in orphans.slices:
            CONSOLE.print(f"{slice_.item.name} in {slice_.item.zone}, of cluster {slice_.cluster!r}: {slice_.item.state}", highlight=False)
        for other in orphans.others:
            place = f" in {other.zone}" if other.zone else ""
            CONSOLE.print(f"{other.kind} {other.name}{place}, of cluster {other.cluster!r}: {other.state}", highlight=False)
    count, more = sum(map(len, found)), sum(map(len, everything)) - sum(map(len, found))
    if more:
        ERRORS.print(f"{more} more were made by another machine or user; --any-owner deletes them as well", highlight=False, soft_wrap=True)
    slices = sum(len(orphans.slices) for orphans in found)
    what = f"{slices} slices" if slices == count else f"{slices} slices, {count - slices} head VMs and secrets"
    if count:
        confirm(f"Delete these {what}?", yes)
    for orphans in found:
        orphans.delete()
    CONSOLE.print(f"{what} are being deleted" if count else "there are no orphans", highlight=False)
    if problems:
        raise ClusterError("\n".join(problems))


def _bare(name: str | None) -> bare.BareSlices | None:
    """The slices without Ray that are meant: named, or the only thing there is."""
    if name is not None:
        return bare.find(name)
    found = bare.list_bare()
    return found[0] if len(found) == 1 and not clusters.list_unended() else None


def _stop_bare(slices: bare.BareSlices, *, yes: bool) -> None:
    config = slices.config
    confirm(f"Stop the slices of {config.name!r}?", yes)
    if config.cloud == "emulated":
        config = local.with_local_endpoints(config, bundle_hash())
    count = TPUProvider.connect(config).stop()
    bare.forget(config.name)
    configs = [cluster.config for cluster in clusters.list_unended()] + [one.config for one in bare.list_bare()]
    if config.cloud == "emulated" and not any(other.cloud == "emulated" for other in configs):
        local.stop_emulator()
    CONSOLE.print(f"{config.name!r} is stopped, with its {count} slices", highlight=False)


def unfinished_runs(cluster: Cluster) -> list[RunDirectory]:
    """The cluster's runs that have no final state yet: those in its index here, and those that its head tells of when it can be asked."""
    urls = {entry.run_directory for entry in index_of(cluster.config).entries()}
    try:
        if cluster.alive() and cluster.token_file.exists():
            urls |= set(jobs.run_directories(cluster))
    except PodlaunchError as error:  # what cannot be asked must be stopped all the same
        logger.info("the head does not tell of its runs: %s", error)
    found = [RunDirectory(url, cluster.config.storage_endpoint) for url in sorted(urls)]
    return [run for run in found if (status := run.status()) is not None and status.state not in FINAL and status.cluster == cluster.name]


def which(name: str | None, *, ended: bool = False) -> Cluster | None:
    """The cluster that is meant: named, or the only one here. A name that is unknown here is looked for in the project.

    `ended`: also one that has ended by itself. Raises PodlaunchError when there are several, or none of that name.
    """
    known = clusters.list_clusters() if ended else clusters.list_unended()
    names = [cluster.name for cluster in known] + [one.config.name for one in bare.list_bare()]
    if name is None and len(names) > 1:
        raise PodlaunchError(f"several clusters are up, name one: {', '.join(names)}")
    if name is None:
        return known[0] if known else None
    found = next((cluster for cluster in known if cluster.name == name), None)
    if found is not None:
        return found
    problems: list[str] = []
    for cluster in clusters_elsewhere(problems.append, name):
        return cluster
    reasons = "".join(f"; {problem}" for problem in problems)
    raise PodlaunchError(f"there is no cluster {name!r}; up: {', '.join(names) or 'none'}{reasons}")
