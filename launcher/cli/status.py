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
from cluster.tpu.catalog import by_name
from cluster.tpu.lifecycle import BILLED, Life
from cluster.tpu.orphans import Orphan
from cluster.tpu.provider import TPUProvider
from cluster.tpu.refusals import read_refusals
from cluster.tpu.status import SliceStatus, slice_status
from launcher.cli.options import CONSOLE
from launcher.cli.places import orphans_everywhere

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
        keep_showing(lambda: _show(_rows()), lambda: time.sleep(interval), clear=CONSOLE.clear if CONSOLE.is_terminal else CONSOLE.rule)
    else:
        _show(_rows())


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
    orphans = [orphan for _, orphan in orphans_everywhere(problems.append)]
    if orphans or problems:
        rows.append({"kind": "orphans", "slices": [_orphan_row(one) for one in orphans], "problem": "; ".join(problems) or None})
    return rows


def _describe(cluster: Cluster) -> dict[str, Any]:
    row = _head_row("cluster", cluster.config, cluster.created)
    row |= {"head": "UP" if cluster.alive() else "DOWN", "dashboard": cluster.head.dashboard_url}
    row |= {"refusals": list(_refusals(cluster))}
    try:
        joined = [node.slice_name for node in cluster.http.nodes() if node.alive] if cluster.alive() else []
        for one in cluster.provider().get_status().slices:
            row["slices"].append(_slice_row(one, cluster.config, joined.count(one.name)))
    except PodlaunchError as error:
        row["problem"] = str(error)
    return row


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


def _show(rows: list[dict[str, Any]]) -> None:
    if all(row["kind"] == "orphans" for row in rows):
        CONSOLE.print("no cluster is up", highlight=False)
    for row in rows:
        _TITLES[row["kind"]](row)
        for line in [*row.get("refusals", []), *filter(None, [row["problem"]])]:
            CONSOLE.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
        if row["slices"]:
            CONSOLE.print(_table(row["slices"]))


def _title_cluster(row: dict[str, Any]) -> None:
    age = short_duration(time.time() - row["created"])
    CONSOLE.print(f"cluster {row['name']}  head {row['head']}  {age}  {row['dashboard']}", highlight=False, soft_wrap=True)
    if not row["slices"]:
        CONSOLE.print("  no slices; the first run brings them", highlight=False)


def _title_bare(row: dict[str, Any]) -> None:
    age = short_duration(time.time() - row["created"])
    CONSOLE.print(f"slices without Ray {row['name']}  {age}", highlight=False, soft_wrap=True)


def _title_orphans(row: dict[str, Any]) -> None:
    if row["slices"]:
        text = "slices that no cluster known here owns; `tpu stop --orphans` deletes those that were made from here"
        CONSOLE.print(text, highlight=False, soft_wrap=True)


_TITLES: dict[str, Callable[[dict[str, Any]], None]] = {"cluster": _title_cluster, "bare": _title_bare, "orphans": _title_orphans}


def _table(slices: list[dict[str, Any]]) -> Table:
    table = Table("NAME", "TYPE / TOPOLOGY", "ZONE", "HOSTS", "STATUS", "AGE", "$/h", box=None)
    for one in slices:
        price = "?" if one["usd_per_hour"] is None else f"{one['usd_per_hour']:.2f}"
        hosts = str(one["hosts"]) if one["hosts_ready"] is None else f"{one['hosts_ready']}/{one['hosts']}"
        said = one["state"] if one["reason"] is None else f"{one['state']}: {one['reason']}"
        origin = "" if one.get("ours", True) else ", made elsewhere"
        if one.get("existing"):
            said = f"{said}, existing"
        name = f"{one['name']} (of {one['cluster']}{origin})" if "cluster" in one else one["name"]
        table.add_row(name, one["type"], one["zone"], hosts, said, short_duration(one["age_s"]), price)
    return table
