"""What can be done to the emulated cloud from the command line: everything that its admin endpoint can do (cluster.emulator.admin).

Names are checked here, so that a wrong one is told with what was probably meant.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any

import typer

from cluster import local
from cluster.emulator.faults import BOOT_HOST, PRESETS, Effect, Fault
from cluster.errors import ConfigError
from cluster.schema import did_you_mean
from cluster.tpu.catalog import all_types
from cluster.tpu.lifecycle import LIFE_OF_STATE
from launcher.cli.options import CONSOLE

_EXAMPLE = '{"effect": "error", "method": "GetNode", "code": 14, "words": "try later", "count": 3}'
_ZONE = re.compile(r"[a-z]+-[a-z]+[0-9]+-[a-z]")
_PLACE = re.compile(r"[a-z]+-[a-z]+[0-9]+(-[a-z])?")
_UNLIMITED = "unlimited"
_HOST_ACTIONS = {"kill": "kill", "hang": "hang", "resume": "wake", "boot": "boot"}
_SLOW_BOOT = "slow-boot"
_INSTANCE_ACTIONS = {**_HOST_ACTIONS, "lose": "lose", "terminate": "terminate"}
_GENERATIONS = tuple(dict.fromkeys(kind.generation for kind in all_types()))

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Node = Annotated[str, typer.Argument(help="A node's id, or its whole path.")]
Zone = Annotated[str, typer.Argument(help="Such as us-central2-b.")]
Amount = Annotated[str, typer.Argument(help=f"A whole number, or {_UNLIMITED} to remove the limit.")]
Notice = Annotated[
    float | None, typer.Option(metavar="SECONDS", min=0, help="How long before it happens its hosts are told; 0: not at all.")
]


def preempt(node: Node, notice: Notice = None) -> None:
    """Take a node back, as spot capacity is."""
    _check_node(node)
    local.ask_emulator("POST", "/preempt", {"node": node, "notice": notice})


def maintenance(node: Node, notice: Notice = None) -> None:
    """Let a maintenance event strike a node: its hosts end and boot again."""
    _check_node(node)
    local.ask_emulator("POST", "/maintain", {"node": node, "notice": notice})


def host(
    action: Annotated[str, typer.Argument(help=f"One of: {', '.join([*_HOST_ACTIONS, _SLOW_BOOT])}.")],
    node: Annotated[str, typer.Argument(help="A node's id, or its whole path; for slow-boot also one that is still to come.")],
    worker: Annotated[int, typer.Argument(min=0, help="Which host, by worker id.")],
    seconds: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="How late it boots, for slow-boot; without it, never.")
    ] = None,
) -> None:
    """Let a host die, stand still, go on, boot again, or boot late. Its node stays READY. Slow-boot prints the number of its fault."""
    _check_word("host action", action, [*_HOST_ACTIONS, _SLOW_BOOT])
    if action != _SLOW_BOOT:
        if seconds is not None:
            raise ConfigError(f"--seconds goes with {_SLOW_BOOT} only")
        _check_node(node)
        local.ask_emulator("POST", "/host", {"node": node, "worker": worker, "action": _HOST_ACTIONS[action]})
        return
    effect = {"effect": Effect.HANG.value} if seconds is None else {"effect": Effect.LATENCY.value, "seconds": seconds}
    pattern = f"*/nodes/{node.rpartition('/')[2]}/hosts/{worker}"
    print(local.ask_emulator("POST", "/faults", {**effect, "method": BOOT_HOST, "resource": pattern, "count": 1})["id"])


def instance(
    action: Annotated[str, typer.Argument(help=f"One of: {', '.join(_INSTANCE_ACTIONS)}.")],
    name: Annotated[str, typer.Argument(metavar="INSTANCE", help="A Compute Engine instance, by name or whole path.")],
) -> None:
    """Let an instance (a head VM) die, stand still, go on, boot again, be lost without a trace, or end as TERMINATED."""
    _check_word("instance action", action, _INSTANCE_ACTIONS)
    _check_known("instance", name, [one["name"] for one in local.ask_emulator("GET", "/instances")])
    local.ask_emulator("POST", "/instance", {"instance": name, "action": _INSTANCE_ACTIONS[action]})


def run(
    node: Node,
    worker: Annotated[int, typer.Argument(min=0, help="Which host, by worker id.")],
    command: Annotated[str, typer.Argument(help="A shell command.")],
) -> None:
    """Run a command on a host, as SSH would; ends with its exit code."""
    _check_node(node)
    done = local.ask_emulator("POST", "/run", {"node": node, "worker": worker, "command": command}, timeout=150.0)
    print(done["output"], end="")
    raise typer.Exit(done["code"])


def state(node: Node, name: Annotated[str, typer.Argument(metavar="STATE", help="A state of the API, such as REPAIRING.")]) -> None:
    """Let the API show a state for a node, whatever its hosts do."""
    _check_node(node)
    _check_word("node state", name, LIFE_OF_STATE)
    local.ask_emulator("POST", "/state", {"node": node, "state": name})


def capacity(zone: Zone, what: Annotated[str, typer.Argument(help="An accelerator type, a generation, or '*'.")], amount: Amount) -> None:
    """Limit what a zone can hold in all: slices of a type, or chips of a generation or of everything."""
    _check_zone(zone)
    if what != "*":
        _check_word("accelerator type or generation", what, [*_GENERATIONS, *(kind.name for kind in all_types())])
    local.ask_emulator("POST", "/capacity", {"zone": zone, "what": what, "amount": _number(amount)})


def quota(
    place: Annotated[str, typer.Argument(help="A zone or a region, such as us-central2.")],
    generation: Annotated[str, typer.Argument(help=f"One of: {', '.join(_GENERATIONS)}.")],
    amount: Amount,
    spot: Annotated[bool, typer.Option("--spot", help="The quota of spot and preemptible slices instead of on-demand ones.")] = False,
) -> None:
    """Set a quota, in TensorCores, for v5e and v6e in chips."""
    if not _PLACE.fullmatch(place):
        raise ConfigError(f"{place!r} is neither a zone nor a region; they look like us-central2-b and us-central2")
    _check_word("generation", generation, _GENERATIONS)
    local.ask_emulator("POST", "/quota", {"place": place, "generation": generation, "amount": _number(amount), "spot": spot})


def zone(name: Annotated[str, typer.Argument(metavar="ZONE")], what: Annotated[str, typer.Argument(help="down or up.")]) -> None:
    """Let a zone be unreachable, or reachable again."""
    _check_zone(name)
    _check_word("state of a zone", what, ["up", "down"])
    local.ask_emulator("POST", "/reachable", {"zone": name, "reachable": what == "up"})


def fault(
    preset: Annotated[
        str | None, typer.Argument(metavar="[PRESET | add PRESET | list | clear [NUMBER]]", help=f"Presets: {', '.join(sorted(PRESETS))}.")
    ] = None,
    more: Annotated[str | None, typer.Argument(hidden=True)] = None,
    rule: Annotated[str | None, typer.Option(metavar="JSON", help=f"A rule, such as {_EXAMPLE}.")] = None,
    method: Annotated[str | None, typer.Option(help="Which methods, as a pattern: CreateNode, List*, BootHost.")] = None,
    service: Annotated[str | None, typer.Option(help="Which services, as a pattern: tpu, compute, secretmanager.")] = None,
    zone: Annotated[str | None, typer.Option(help="Which zones, as a pattern.")] = None,
    resource: Annotated[str | None, typer.Option(help="Which resources, as a pattern on the path or its last part.")] = None,
    count: Annotated[int | None, typer.Option(help="How often it strikes; without it, always.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove all faults.")] = False,
    as_json: AsJson = False,
) -> None:
    """Let calls fail, break, wait or hang, and print the rule's number; list rules, or remove them."""
    action = preset if preset in ("add", "list", "clear") else "clear" if clear else "add"
    name = more if preset in ("add", "list", "clear") else preset
    if preset is not None and preset not in ("add", "list", "clear") and more is not None:
        raise ConfigError(f"one preset at a time; {more!r} is one word too many")
    if action == "list":
        _list_faults(as_json)
    elif action == "clear":
        _clear_faults(name)
    else:
        given = {"preset": name, "method": method, "service": service, "zone": zone, "resource": resource, "count": count}
        _add_fault({**(_parse(rule) if rule is not None else {}), **{key: value for key, value in given.items() if value is not None}})


def clock(
    advance: Annotated[float, typer.Option(metavar="SECONDS", help="Move its time on by so much.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Print its time, in seconds since the epoch; move it on first."""
    if advance < 0:
        raise ConfigError(f"--advance {advance:g}: time runs one way")
    answer = local.ask_emulator("POST", "/clock", {"advance": advance}) if advance else local.ask_emulator("GET", "/clock")
    print(json.dumps(answer) if as_json else answer["now"])


VERBS: Mapping[str, Callable[..., None]] = {
    "preempt": preempt,
    "maintenance": maintenance,
    "host": host,
    "instance": instance,
    "run": run,
    "state": state,
    "capacity": capacity,
    "quota": quota,
    "zone": zone,
    "fault": fault,
    "clock": clock,
}


def limit_lines(limits: Mapping[str, Any]) -> Iterator[str]:
    """A line for every limit that is set."""
    for one in limits["capacity"]:
        yield f"capacity of {one['zone']}: {one['amount']} of {one['what']}"
    for one in limits["quota"]:
        yield f"quota in {one['place']}: {one['amount']} of {one['generation']}, {one['tier']}"
    for one in limits["unreachable"]:
        yield f"zone {one} is unreachable"


def fault_lines(faults: Mapping[str, Any]) -> Iterator[str]:
    """A line for every fault that is set."""
    for number, rule in faults.items():
        left = "always" if rule["count"] is None else f"{rule['count']} times"
        where = "".join(f" {key} {rule[key]}" for key in ("service", "zone", "resource") if rule[key] != "*")
        yield f"fault {number}: {rule['method']} {rule['effect']}{where} {left}"


def _list_faults(as_json: bool) -> None:
    faults = local.ask_emulator("GET", "/faults")
    if as_json:
        print(json.dumps(faults, indent=1))
        return
    for line in fault_lines(faults):
        CONSOLE.print(line, highlight=False, markup=False)


def _clear_faults(number: str | None) -> None:
    if number is None:
        local.ask_emulator("DELETE", "/faults")
        return
    known = local.ask_emulator("GET", "/faults")
    if number not in known:
        raise ConfigError(f"there is no fault {number}; set: {', '.join(known) or 'none'}")
    local.ask_emulator("DELETE", f"/faults/{number}")


def _add_fault(values: dict[str, Any]) -> None:
    if "preset" in values:
        _check_word("preset", str(values["preset"]), PRESETS)
    try:
        Fault.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{error}; name a preset, or give --rule with an effect of {', '.join(item.value for item in Effect)}") from error
    print(local.ask_emulator("POST", "/faults", values)["id"])


def _parse(rule: str) -> dict[str, Any]:
    try:
        values = json.loads(rule)
    except ValueError as error:
        raise ConfigError(f"--rule is not JSON: {error}; an example: {_EXAMPLE}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--rule must be a JSON object; an example: {_EXAMPLE}")
    return values


def _check_word(what: str, word: str, known: Iterable[str]) -> None:
    names = list(known)
    if word not in names:
        raise ConfigError(f"there is no {what} {word!r}{did_you_mean(word, names)}")


def _check_zone(name: str) -> None:
    if not _ZONE.fullmatch(name):
        raise ConfigError(f"{name!r} is no zone; a zone looks like us-central2-b")


def _check_node(name: str) -> None:
    _check_known("node", name, [node["name"] for node in local.ask_emulator("GET", "/nodes")])


def _check_known(what: str, name: str, paths: list[str]) -> None:
    known = [*paths, *(path.rpartition("/")[2] for path in paths)]
    if name not in known:
        near = did_you_mean(name, known[len(paths) :]) if paths else "; there is none"
        raise ConfigError(f"there is no {what} {name!r}{near}")


def _number(text: str) -> int | None:
    if text == _UNLIMITED:
        return None
    if not text.isdecimal():
        raise ConfigError(f"{text!r} is no amount: give a whole number, or {_UNLIMITED}")
    return int(text)
