"""`tpu emulator start|stop|status|preempt|fault|clock`: the Cloud TPU service of this machine, and what befalls it."""

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from cluster import clusters, local
from cluster.emulator.faults import PRESETS, Effect, Fault
from cluster.emulator.profile import PROFILES
from cluster.emulator.storage import NOT_INSTALLED
from cluster.errors import ConfigError
from cluster.vm.bundle import bundle_hash
from launcher.cli.options import CONSOLE, confirm

app = typer.Typer(help="The emulated Cloud TPU service of this machine.", no_args_is_help=True, rich_markup_mode=None)
_EXAMPLE = '{"effect": "error", "method": "GetNode", "code": 14, "words": "try later", "count": 3}'
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Node = Annotated[str, typer.Argument(help="A node's id, or its whole path.")]


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
        raise ConfigError(f"there is no profile {profile!r}; known: {', '.join(PROFILES)}")
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
    """Show where it is reached, its nodes and instances, and the faults that are set."""
    running = local.emulator_status()
    if running is None:
        print("null" if as_json else "no emulated cloud runs")
        return
    nodes, instances, faults = (local.ask_emulator("GET", path) for path in ("/nodes", "/instances", "/faults"))
    if as_json:
        cloud = {"nodes": nodes, "instances": instances, "faults": faults}
        print(json.dumps({**_endpoints(), "profile": running.profile, "pid": running.pid, **cloud}, indent=1))
        return
    _print_endpoints(as_json=False)
    table = Table("NODE OR INSTANCE", "ZONE", "STATE", "HOSTS", box=None)
    for node in nodes:
        up = sum(not (host["exited"] or host["held"]) for host in node["hosts"])
        table.add_row(node["name"].rpartition("/")[2], node["name"].split("/")[3], node["state"], f"{up}/{len(node['hosts'])}")
    for one in instances:
        up = not (one["exited"] or one["held"])
        table.add_row(one["name"].rpartition("/")[2], one["name"].split("/")[3], one["status"], f"{int(up)}/1")
    CONSOLE.print(table)
    for number, rule in faults.items():
        left = "always" if rule["count"] is None else f"{rule['count']} times"
        CONSOLE.print(f"fault {number}: {rule['method']} {rule['effect']} {left}", highlight=False)


@app.command("preempt")
def preempt(
    node: Node,
    notice: Annotated[float | None, typer.Option(metavar="SECONDS", help="How long before its hosts are told; 0: not at all.")] = None,
) -> None:
    """Take a node back, as spot capacity is."""
    local.ask_emulator("POST", "/preempt", {"node": node, "notice": notice})


@app.command("fault")
def fault(
    preset: Annotated[str | None, typer.Argument(help=f"One of: {', '.join(sorted(PRESETS))}.")] = None,
    rule: Annotated[str | None, typer.Option(metavar="JSON", help=f"A rule, such as {_EXAMPLE}.")] = None,
    method: Annotated[str | None, typer.Option(help="Which methods, as a pattern: CreateNode, List*, BootHost.")] = None,
    zone: Annotated[str | None, typer.Option(help="Which zones, as a pattern.")] = None,
    resource: Annotated[str | None, typer.Option(help="Which resources, as a pattern on the path or its last part.")] = None,
    count: Annotated[int | None, typer.Option(help="How often it strikes; without it, always.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove all faults.")] = False,
) -> None:
    """Let calls fail, break, wait or hang. Prints the rule's number."""
    if clear:
        local.ask_emulator("DELETE", "/faults")
        return
    values: dict[str, Any] = _parse(rule) if rule is not None else {}
    given = {"preset": preset, "method": method, "zone": zone, "resource": resource, "count": count}
    values |= {name: value for name, value in given.items() if value is not None}
    try:
        Fault.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{error}; name a preset, or give --rule with an effect of {', '.join(item.value for item in Effect)}") from error
    print(local.ask_emulator("POST", "/faults", values)["id"])


@app.command("clock")
def clock(
    advance: Annotated[float, typer.Option(metavar="SECONDS", help="Move its time on by so much.")] = 0.0,
) -> None:
    """Print its time, in seconds since the epoch; move it on first."""
    answer = local.ask_emulator("POST", "/clock", {"advance": advance}) if advance else local.ask_emulator("GET", "/clock")
    print(answer["now"])


def _parse(rule: str) -> dict[str, Any]:
    try:
        values = json.loads(rule)
    except ValueError as error:
        raise ConfigError(f"--rule is not JSON: {error}; an example: {_EXAMPLE}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--rule must be a JSON object; an example: {_EXAMPLE}")
    return values


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
