"""`tpu status`: clusters, their slices and hosts, as the cloud and Ray have them now."""

import json
import time
from typing import Annotated, Any

import typer
from rich.table import Table

from cluster import clusters
from cluster.clusters import Cluster
from cluster.errors import PodlaunchError
from launcher.cli.options import CONSOLE


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
) -> None:
    """Show clusters, slices and hosts."""
    rows = [_describe(cluster) for cluster in clusters.list_clusters()]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    if not rows:
        CONSOLE.print("no cluster is up", highlight=False)
    for row in rows:
        _print(row)


def _describe(cluster: Cluster) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": cluster.name,
        "head": "UP" if cluster.alive() else "DOWN",
        "dashboard": cluster.head.dashboard_url,
        "type": cluster.config.accelerator.name,
        "topology": cluster.config.accelerator.topology,
        "created": cluster.created,
        "slices": [],
        "problem": None,
    }
    try:
        joined = [node.slice_name for node in cluster.http.nodes() if node.alive] if cluster.alive() else []
        for one in cluster.provider().get_status().slices:
            row["slices"].append(
                {
                    "name": one.name,
                    "zone": one.zone,
                    "state": one.state,
                    "hosts_ready": joined.count(one.name),
                    "hosts": cluster.config.hosts_per_slice,
                    "age_s": round(one.age_seconds),
                    "usd_per_hour": cluster.config.usd_per_slice_hour,
                }
            )
    except PodlaunchError as error:
        row["problem"] = str(error)
    return row


def _print(row: dict[str, Any]) -> None:
    age = round((time.time() - row["created"]) / 60)
    CONSOLE.print(f"cluster {row['name']}  head {row['head']}  {age} min  {row['dashboard']}", highlight=False, soft_wrap=True)
    if row["problem"]:
        CONSOLE.print(f"  {row['problem']}", highlight=False, soft_wrap=True, markup=False)
    table = Table("NAME", "TYPE / TOPOLOGY", "ZONE", "HOSTS", "STATUS", "AGE", "$/h", box=None)
    for one in row["slices"]:
        price = "?" if one["usd_per_hour"] is None else f"{one['usd_per_hour']:.2f}"
        minutes = f"{one['age_s'] // 60} min"
        kind = f"{row['type']} / {row['topology']}"
        table.add_row(one["name"], kind, one["zone"], f"{one['hosts_ready']}/{one['hosts']}", one["state"], minutes, price)
    if row["slices"]:
        CONSOLE.print(table)
    else:
        CONSOLE.print("  no slices; the first run brings them", highlight=False)
