"""`tpu emulator`: the Cloud TPU service of this machine. What befalls it is in emulator_incidents.py."""

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from cluster import clusters, local
from cluster.emulator.profile import PROFILES
from cluster.emulator.storage import NOT_INSTALLED
from cluster.errors import ConfigError
from cluster.schema import did_you_mean
from cluster.vm.bundle import bundle_hash
from launcher.cli import emulator_incidents as incidents
from launcher.cli.options import CONSOLE, confirm

app = typer.Typer(help="The emulated Cloud TPU service of this machine, and what befalls it.", no_args_is_help=True, rich_markup_mode=None)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]


@app.command("start")
def start(
    profile: Annotated[str | None, typer.Option(help=f"How long everything takes: {', '.join(PROFILES)}.")] = None,
    bare_image: Annotated[
        bool, typer.Option("--bare-image", help="Hosts find nothing of ours on their disks, and install it from the cluster's bucket.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Start it, or find it running. Prints where it is reached."""
    if profile is not None and profile not in PROFILES:
        raise ConfigError(f"there is no profile {profile!r}{did_you_mean(profile, PROFILES)}")
    local.ensure_emulator("" if bare_image else bundle_hash(), profile=profile)
    _print_endpoints(as_json)


@app.command("stop")
def stop(
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    keep_nodes: Annotated[
        bool, typer.Option("--keep-nodes", help="End the service only; the next one finds nodes and hosts again.")
    ] = False,
) -> None:
    """End it, with all of its nodes, instances, hosts and secrets. What its object storage holds stays."""
    users = [cluster.name for cluster in clusters.list_unended() if cluster.config.cloud == "emulated"]
    if users and not keep_nodes:
        confirm(f"Clusters {', '.join(users)} have their slices there. End them with it?", yes)
    done = local.stop_emulator(delete_nodes=not keep_nodes)
    CONSOLE.print("the emulated cloud is stopped" if done else "no emulated cloud runs", highlight=False)


@app.command("status")
def status(as_json: AsJson = False) -> None:
    """Show where it is reached, its nodes and instances, its limits, and the faults that are set."""
    running = local.emulator_status()
    if running is None:
        print("null" if as_json else "no emulated cloud runs")
        return
    nodes, instances, faults, limits = (local.ask_emulator("GET", path) for path in ("/nodes", "/instances", "/faults", "/limits"))
    if as_json:
        found = {"profile": running.profile, "pid": running.pid, "nodes": nodes, "instances": instances, "faults": faults, **limits}
        print(json.dumps({**_endpoints(), **found}, indent=1))
        return
    _print_endpoints(as_json=False)
    CONSOLE.print(_table(nodes, instances))
    for line in [*incidents.limit_lines(limits), *incidents.fault_lines(faults)]:
        CONSOLE.print(line, highlight=False, markup=False)


for name, verb in incidents.VERBS.items():
    app.command(name)(verb)


def _table(nodes: list[dict[str, Any]], instances: list[dict[str, Any]]) -> Table:
    table = Table("NODE OR INSTANCE", "ZONE", "STATE", "HOSTS", box=None)
    for node in nodes:
        up = sum(not (host["exited"] or host["held"]) for host in node["hosts"])
        table.add_row(node["name"].rpartition("/")[2], node["name"].split("/")[3], node["state"], f"{up}/{len(node['hosts'])}")
    for one in instances:
        runs = not (one["exited"] or one["held"])
        table.add_row(one["name"].rpartition("/")[2], one["name"].split("/")[3], one["status"], f"{int(runs)}/1")
    return table


def _endpoints() -> dict[str, str]:
    running = local.emulator_status()
    if running is None:
        return {}
    return {"grpc": running.endpoint, "rest": running.rest, "admin": running.admin, "storage": running.storage}


def _print_endpoints(as_json: bool) -> None:
    if as_json:
        print(json.dumps(_endpoints()))
        return
    for name, place in _endpoints().items():
        CONSOLE.print(f"{name:7}  {place or NOT_INSTALLED}", highlight=False)
