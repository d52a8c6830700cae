"""`tpu status`: clusters, their slices and hosts, as the cloud and Ray have them now, and slices that no cluster owns."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.table import Table

from cluster import bare, clusters
from cluster.clusters import Cluster
from cluster.config import ClusterConfig
from cluster.durations import short_duration
from cluster.errors import ConfigError, PodlaunchError
from cluster.leftovers import Leftover
from cluster.listeners import wider_than_needed
from cluster.tpu.catalog import by_name
from cluster.tpu.errors import TPUError
from cluster.tpu.lifecycle import BILLED, Life
from cluster.tpu.orphans import Orphan
from cluster.tpu.provider import TPUProvider
from cluster.tpu.refusals import read_refusals
from cluster.tpu.status import SliceStatus, slice_status
from cluster.vm.metadata import TROUBLE
from launcher.cli.options import CONSOLE
from launcher.cli.places import Orphans, clusters_elsewhere, orphans_everywhere

_FRESH_S = 15.0
"""The autoscaler writes down what was refused every few seconds; older than this it has stopped doing so."""


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again and again until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks, with --watch.")] = 2.0,
) -> None:
    """Show clusters, slices and hosts."""
    if as_json and watch:
        raise ConfigError("--json and --watch do not go together: call `tpu status --json` as often as you like")
    if as_json:
        print(json.dumps(_rows(), indent=1))
    elif watch:
        watch_console(lambda: _show(_rows()), interval)
    else:
        _show(_rows())


def watch_console(show: Callable[[], None], interval: float) -> None:
    """Show it on the console again and again, `interval` seconds apart, until Ctrl-C."""
    keep_showing(show, lambda: time.sleep(interval), clear=CONSOLE.clear if CONSOLE.is_terminal else CONSOLE.rule)


def keep_showing(show: Callable[[], None], pause: Callable[[], None], clear: Callable[[], None]) -> None:
    """Until somebody interrupts: that is how a watch ends, so it is no error."""
    try:
        while True:
            clear()
            show()
            pause()
    except KeyboardInterrupt:
        return


def _rows() -> list[dict[str, Any]]:
    rows = [_describe(cluster) for cluster in clusters.list_clusters()]
    rows += [_describe_bare(one) for one in bare.list_bare()]
    problems: list[str] = []
    found = orphans_everywhere(problems.append, thorough=False)
    elsewhere = _owned_elsewhere(found, problems.append)
    rows += [_describe_elsewhere(cluster) for cluster in elsewhere]
    left = [orphans.without({cluster.name for cluster in elsewhere}) for orphans in found]
    orphan_rows = [row for orphans in left for row in (*map(_orphan_row, orphans.slices), *map(_leftover_row, orphans.others))]
    if orphan_rows or problems:
        rows.append({"kind": "orphans", "slices": orphan_rows, "problem": "; ".join(problems) or None})
    return rows


def _owned_elsewhere(found: list[Orphans], problem: Callable[[str], None]) -> list[Cluster]:
    """Living clusters that other machines made: what belongs to them is no orphan."""
    heads = {
        one.cluster for orphans in found for one in orphans.others if one.kind == "head VM" and not one.ours and one.state == "RUNNING"
    }
    return [cluster for cluster in clusters_elsewhere(problem) if cluster.name in heads] if heads else []


def _describe(cluster: Cluster) -> dict[str, Any]:
    row = _head_row("cluster", cluster.config, cluster.created)
    row |= {"head": "UNKNOWN", "dashboard": "", "ended": cluster.ended, "elsewhere": False, "refusals": [], "open": []}
    try:
        cluster = clusters.notice_autostop(cluster)
        if cluster.ended is not None:
            return row | {"head": "ENDED", "ended": cluster.ended}
        alive = cluster.alive()
        row |= {"head": "UP" if alive else "DOWN", "refusals": list(_refusals(cluster))}
        row["open"] = list(wider_than_needed(cluster.config)) if alive else []
        row["dashboard"] = cluster.head.show_url() if alive else ""
        _add_slices(row, cluster, [node.slice_name for node in cluster.http.nodes() if node.alive] if alive else [])
    except PodlaunchError as error:
        row["problem"] = str(error)
    return row


def _describe_elsewhere(cluster: Cluster) -> dict[str, Any]:
    """Without a look into its Ray, for which its token would have to be fetched."""
    row = _head_row("cluster", cluster.config, cluster.created)
    row |= {"head": "UP", "dashboard": f"use it with `tpu start {cluster.name}`", "ended": None, "elsewhere": True, "refusals": []}
    row["open"] = list(wider_than_needed(cluster.config))
    try:
        _add_slices(row, cluster, None)
    except PodlaunchError as error:
        row["problem"] = str(error)
    return row


def _add_slices(row: dict[str, Any], cluster: Cluster, joined: list[str] | None) -> None:
    provider = cluster.provider()
    for one in provider.get_status().slices:
        kind = cluster.config.type_like(one.accelerator_type)
        ready = None if joined is None else joined.count(one.name)
        row["slices"].append(_slice_row(one, kind, ready))
        if one.life is Life.READY and ready is not None and ready < kind.hosts_per_slice:
            row["troubles"] += _troubles(provider, one)


def _troubles(provider: TPUProvider, one: SliceStatus) -> list[str]:
    """What hosts of a slice say about why they cannot join."""
    try:
        return [f"{one.name} {words}" for words in provider.api.guest_attribute(one.zone, one.name, TROUBLE)]
    except TPUError as error:
        return [f"the hosts of {one.name} cannot be asked: {error}"]


def _refusals(cluster: Cluster) -> Iterator[str]:
    """What zones have said, with the age of that: it is what the autoscaler knew then."""
    written, lines = read_refusals(cluster.name)
    for line in lines:
        age = time.time() - written
        yield line if age < _FRESH_S else f"{line} (as of {short_duration(age)} ago)"


def _describe_bare(slices: bare.BareSlices) -> dict[str, Any]:
    row = _head_row("bare", slices.config, slices.created)
    try:
        for one in TPUProvider.connect(slices.config, patience=10.0).get_status().slices:
            row["slices"].append(_slice_row(one, slices.config, None))
    except PodlaunchError as error:
        row["problem"] = str(error)
    return row


def _head_row(kind: str, config: ClusterConfig, created: float) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": config.name,
        "type": config.accelerator.name,
        "topology": config.accelerator.topology,
        "created": created,
        "slices": [],
        "troubles": [],
        "problem": None,
    }


def _slice_row(one: SliceStatus, config: ClusterConfig, ready: int | None) -> dict[str, Any]:
    """`ready`: how many hosts have joined Ray; None where there is no Ray."""
    return {
        "name": one.name,
        "type": f"{config.accelerator.name} / {config.accelerator.topology}",
        "zone": one.zone,
        "state": one.state,
        "reason": one.reason or _not_ready(one, config, ready),
        "hosts_ready": ready,
        "hosts": config.hosts_per_slice,
        "age_s": round(one.age_seconds),
        "usd_per_hour": config.usd_per_slice_hour if one.life in BILLED else 0.0,
        "existing": one.existing,
    }


def _not_ready(one: SliceStatus, config: ClusterConfig, joined: int | None) -> str | None:
    """Why nothing can run on a slice that is not lost; None when all is well, or when its state says it all."""
    if one.life is Life.READY and joined is not None and joined < config.hosts_per_slice:
        return f"{config.hosts_per_slice - joined} hosts have not joined yet"
    if one.life is Life.PENDING and one.state in ("ACCEPTED", "WAITING_FOR_RESOURCES"):
        left = config.valid_until_seconds - one.age_seconds
        return f"waits for capacity, at most {short_duration(left)} more"
    return None if one.health in ("HEALTHY", "HEALTH_UNSPECIFIED") else one.health


def _orphan_row(orphan: Orphan) -> dict[str, Any]:
    one = slice_status(orphan.item, time.time())
    kind = by_name().get(one.accelerator_type)
    return {
        "name": one.name,
        "type": one.accelerator_type if kind is None else f"{kind.name} / {orphan.item.topology or kind.topology}",
        "zone": one.zone,
        "state": one.state,
        "reason": one.reason,
        "hosts_ready": None,
        "hosts": len(one.hosts) if kind is None else kind.hosts,
        "age_s": round(one.age_seconds),
        "usd_per_hour": one.usd_per_hour,
        "cluster": orphan.cluster,
        "ours": orphan.ours,
    }


def _leftover_row(leftover: Leftover) -> dict[str, Any]:
    age = None if leftover.created is None else round(time.time() - leftover.created)
    return {
        "name": leftover.name,
        "type": leftover.kind,
        "zone": leftover.zone,
        "state": leftover.state,
        "reason": None,
        "hosts_ready": None,
        "hosts": 0,
        "age_s": age,
        "usd_per_hour": None if leftover.kind == "head VM" else 0.0,
        "cluster": leftover.cluster,
        "ours": leftover.ours,
    }


def _show(rows: list[dict[str, Any]]) -> None:
    if all(row["kind"] == "orphans" for row in rows):
        CONSOLE.print("no cluster is up", highlight=False)
    for row in rows:
        _TITLES[row["kind"]](row)
        for line in [*row.get("refusals", []), *row.get("open", []), *row.get("troubles", []), *filter(None, [row["problem"]])]:
            CONSOLE.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
        if row["slices"]:
            CONSOLE.print(_table(row["slices"]))


def _title_cluster(row: dict[str, Any]) -> None:
    age = short_duration(time.time() - row["created"])
    if row["ended"] is not None:
        CONSOLE.print(f"cluster {row['name']}  {row['ended']}; `tpu start` brings it up again", highlight=False, soft_wrap=True)
        return
    made = "  made on another machine" if row["elsewhere"] else ""
    CONSOLE.print(f"cluster {row['name']}  head {row['head']}  {age}  {row['dashboard']}{made}", highlight=False, soft_wrap=True)
    if not row["slices"]:
        CONSOLE.print("  no slices; the first run brings them", highlight=False)


def _title_bare(row: dict[str, Any]) -> None:
    age = short_duration(time.time() - row["created"])
    CONSOLE.print(f"slices without Ray {row['name']}  {age}", highlight=False, soft_wrap=True)


def _title_orphans(row: dict[str, Any]) -> None:
    if row["slices"]:
        text = "what no cluster known here owns; `tpu stop --orphans` deletes what was made from here"
        CONSOLE.print(text, highlight=False, soft_wrap=True)


_TITLES: dict[str, Callable[[dict[str, Any]], None]] = {"cluster": _title_cluster, "bare": _title_bare, "orphans": _title_orphans}


def _table(slices: list[dict[str, Any]]) -> Table:
    table = Table("NAME", "TYPE / TOPOLOGY", "ZONE", "HOSTS", "STATUS", "AGE", "$/h", box=None)
    for one in slices:
        price = "?" if one["usd_per_hour"] is None else f"{one['usd_per_hour']:.2f}"
        hosts = str(one["hosts"]) if one["hosts_ready"] is None else f"{one['hosts_ready']}/{one['hosts']}"
        said = one["state"] if one["reason"] is None else f"{one['state']}: {one['reason']}"
        age = "" if one["age_s"] is None else short_duration(one["age_s"])
        origin = "" if one.get("ours", True) else ", made elsewhere"
        if one.get("existing"):
            said = f"{said}, existing"
        name = f"{one['name']} (of {one['cluster']}{origin})" if "cluster" in one else one["name"]
        table.add_row(name, one["type"], one["zone"], hosts, said, age, price)
    return table
