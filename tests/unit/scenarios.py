"""Seeded scenarios of a cloud that goes wrong and of our own processes that crash, on a virtual clock.

`generate` makes a scenario from its seed alone, as plain data that prints in a few lines; `play` runs it and says what is wrong in the end.
"""

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ray.autoscaler.tags import TAG_RAY_LAUNCH_REQUEST, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

from cluster.autoscaler import autoscaler_config, host_settings
from cluster.config import ClusterConfig
from cluster.emulator.faults import TPU_PRESETS, Effect, Fault
from cluster.emulator.model import Refusal
from cluster.emulator.profile import Profile
from cluster.node_names import slice_id
from cluster.node_provider import PATIENCE_S, SliceNodeProvider
from cluster.secret_place import SecretPlace
from cluster.tpu.errors import TPUError
from cluster.tpu.provider import TPUProvider
from cluster.vm.bundle import Bundle
from tests.inprocess import Channel, World, world

ZONES = ("us-central2-b", "us-east5-a", "europe-west4-a")
KIND = "v4-16"
WORKER = {TAG_RAY_NODE_KIND: "worker"}
_METHODS = (
    "*", "Create*", "CreateNode", "CreateQueuedResource", "List*", "ListNodes", "ListQueuedResources", "Delete*", "DeleteNode",
    "DeleteQueuedResource", "Get*", "GetOperation",
)  # fmt: skip
_WORK = ("*", "Create*", "CreateNode", "CreateQueuedResource", "Delete*", "Delete*", "DeleteNode", "DeleteQueuedResource")
_STATES = ("STOPPED", "STOPPING", "TERMINATED", "REPAIRING", "RESTARTING", "HIDDEN", "UNKNOWN", "PREEMPTED", "READY")
_DEAD = frozenset({"DELETING", "FAILED", "SUSPENDED", "SUSPENDING", "PREEMPTED", "TERMINATED", "STOPPED", "STOPPING"})
Event = tuple[Any, ...]


class Crash(BaseException):
    """The process ends here: nothing of it runs after this."""


@dataclass(frozen=True)
class End:
    """How a process of ours ends before it is done."""

    call: int
    """At which call of the API, counted from 1."""
    answered: bool
    """Whether the service has acted."""
    error: type[BaseException]

    def __repr__(self) -> str:
        return f"{self.error.__name__}{' after' if self.answered else ' before'} call {self.call}"


@dataclass(frozen=True)
class Act:
    """What one process of ours does, and what happens meanwhile."""

    verb: str
    """start, stop, status, wait or ray."""
    seconds: float
    end: End | None = None
    events: tuple[tuple[float, Event], ...] = ()
    """Seconds from the act's begin, and what happens then."""


@dataclass(frozen=True)
class Scenario:
    seed: int
    config: ClusterConfig
    profile: Profile
    poll: float
    acts: tuple[Act, ...]
    final: str
    """live, stop, or ray."""

    def __str__(self) -> str:
        config = self.config
        kind = f"{'queued' if config.queued_resource else 'plain'} {config.provisioning}"
        profile = " ".join(f"{name}={value:g}" for name, value in vars(self.profile).items())
        lines = [f"seed {self.seed}: {config.slices} x {kind} in {', '.join(config.zones)}, valid {config.valid_until}; {profile}"]
        for act in self.acts:
            lines.append(f"  {act.verb} {act.seconds:g}s{f', {act.end}' if act.end else ''}")
            lines += [f"    +{delay:g}s {' '.join(map(str, event))}" for delay, event in act.events]
        return "\n".join([*lines, f"  faults lifted; {self.final}"])


def generate(seed: int) -> Scenario:
    rng = random.Random(seed)
    zones = list(ZONES[: rng.choice([1, 2, 2, 3])])
    config = ClusterConfig(
        name="mine",
        project="my-project",
        zones=zones,
        accelerator_type=KIND,
        slices=rng.choice([1, 1, 2, 3]),
        queued_resource=rng.random() < 0.6,
        provisioning=rng.choice(["on-demand", "spot"]),
        valid_until=rng.choice(["5m", "15m", "40m"]),
        zone_patience=rng.choice(["2m", "5m"]),
        max_slices=4,
    )
    profile = Profile(
        create=rng.choice([0, 20, 60, 120]),
        delete=rng.choice([0, 10, 30]),
        accept=rng.choice([0, 2]),
        queue=rng.choice([0, 10]),
        suspend=rng.choice([0, 20]),
        notice=30.0,
        maintenance=rng.choice([60, 600]),
    )
    ray = rng.random() < 0.5
    acts = tuple(_act(rng, zones, ray=ray) for _ in range(rng.randint(2, 5)))
    final = "stop" if rng.random() < 0.35 else "ray" if ray else "live"
    return Scenario(seed, config, profile, rng.choice([5.0, 10.0]), acts, final)


def _act(rng: random.Random, zones: list[str], *, ray: bool) -> Act:
    verb = rng.choice(["ray"] * 6 + ["stop", "status", "wait"] if ray else ["start"] * 5 + ["stop", "status", "wait"])
    seconds = float({"wait": rng.choice([10, 100, 1000]), "ray": rng.choice([50, 200, 600])}.get(verb, rng.choice([60, 300, 900])))
    end = None
    if rng.random() < 0.5:
        end = End(rng.choice([*range(1, 12), 15, 20, 30, 50]), rng.random() < 0.5, rng.choice([Crash, Crash, KeyboardInterrupt]))
    events = sorted(
        ((rng.choice([0.0, 0.0, 1.0, 5.0, 30.0, 61.0, 150.0]), _event(rng, zones)) for _ in range(rng.choice([0, 1, 1, 2, 3]))),
        key=lambda event: event[0],
    )
    return Act(verb, seconds, end, tuple(events))


def _event(rng: random.Random, zones: list[str]) -> Event:
    zone, pick = rng.choice(zones), rng.randrange(4)
    choices: list[Callable[[], Event]] = [
        lambda: ("fault", _fault(rng, zones)),
        lambda: ("fault", _fault(rng, zones)),
        lambda: ("fault", _fault(rng, zones)),
        lambda: ("clear",),
        lambda: ("capacity", zone, rng.choice([KIND, "v4", "*"]), rng.choice([0, 1, 8, 16, None])),
        lambda: ("capacity", zone, KIND, rng.choice([0, 0, 1, None])),
        lambda: ("quota", rng.choice([zone, zone[:-2]]), rng.choice([0, 16, None]), rng.random() < 0.5),
        lambda: ("reachable", zone, False),
        lambda: ("reachable", zone, True),
        lambda: ("preempt", pick, rng.choice([0.0, 30.0])),
        lambda: ("preempt", pick, 0.0),
        lambda: ("maintain", pick, rng.choice([0.0, 30.0])),
        lambda: ("state", pick, rng.choice(_STATES)),
        lambda: (rng.choice(["kill", "boot", "hang", "wake"]), pick, rng.randrange(2)),
        lambda: ("delete", pick),
        lambda: ("twin", zone, pick),
        lambda: ("lost", zone),
    ]
    return rng.choice(choices)()


def _fault(rng: random.Random, zones: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {"zone": rng.choice(["*", rng.choice(zones)])}
    how = rng.choice(["preset", "preset", "error", "error", "operation-error", "latency", "drop", "drop-answer", "hang", "boot"])
    if how == "preset":
        values["preset"] = rng.choice(sorted(TPU_PRESETS))
    elif how == "boot":
        values |= {"effect": rng.choice(["latency", "hang"]), "method": "BootHost", "seconds": 40.0}
    else:
        values |= {"effect": how, "method": rng.choice(_WORK if how in ("operation-error", "hang") else _METHODS)}
    if how in ("error", "operation-error"):
        values["code"] = rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16])
    if how == "latency":
        values["seconds"] = float(rng.choice([1, 10, 45]))
    values["count"] = rng.choice([1, 1, 2, 5, None])
    if rng.random() < 0.4:
        values |= {"probability": rng.choice([0.2, 0.5, 0.8]), "seed": rng.randrange(1000)}
    if rng.random() < 0.2:
        values["resource"] = "*-0*"
    return values


@dataclass
class Player:
    """Runs the acts of one scenario."""

    scenario: Scenario
    world: World
    problems: list[str] = field(default_factory=list)
    requests: int = 0
    twins: set[str] = field(default_factory=set)

    def play(self) -> None:
        for act in self.scenario.acts:
            for delay, event in act.events:
                self.world.clock.after(delay, lambda event=event: self._happen(event))  # type: ignore[misc]  # bound now
            self.world.clock.advance(0.0)
            self._act(act)
        self._lift()

    def finish(self) -> None:
        """What is right in the end: exactly what the final cluster owns, or nothing."""
        getattr(self, f"_finish_{self.scenario.final}")()

    def _finish_live(self) -> None:
        provider = self._provider(self._channel(None))
        for _ in range(3):  # a cluster that lives goes on looking
            status = provider.start(timeout=4 * 3600.0, poll=15.0)
            self.world.clock.advance(500.0)
        wanted = {f"mine-{index}" for index in range(self.scenario.config.slices)}
        self._check({(item.zone, item.name) for item in status.slices}, wanted)

    def _finish_stop(self) -> None:
        self._provider(self._channel(None)).stop(poll=15.0)
        self._check(set(), set())

    def _finish_ray(self) -> None:
        provider, pending = self._node_provider(self._channel(None)), dict[str, float]()
        count = self.scenario.config.slices
        for _ in range(300):  # 75 min: longer than every limit that the product has for a slice that makes no progress
            self._tick(provider, pending)
            self.world.clock.advance(15.0)
        listed = provider.non_terminated_nodes(WORKER)
        if len(listed) != count or not all(provider.is_running(name) for name in listed):
            self.problems.append(f"Ray has {[(name, provider._known[name].state) for name in listed]}, {count} are wanted")
        self._check({(provider._known[name].zone, name) for name in listed}, set(listed))

    def _check(self, owned: set[tuple[str, str]], names: set[str]) -> None:
        nodes, queued = self.world.nodes(), self.world.queued()
        if set(nodes) != owned or {name for _, name in owned} != names or len(owned) != len(names):
            self.problems.append(f"nodes {nodes}, owned {sorted(owned)}, wanted {sorted(names)}")
        if set(nodes.values()) - {"READY"}:
            self.problems.append(f"not READY: {nodes}")
        stray = {key: state for key, state in queued.items() if key not in owned or state != "ACTIVE"}
        if stray:
            self.problems.append(f"queued resources {stray}, owned {sorted(owned)}")

    def _act(self, act: Act) -> None:
        channel = self._channel(act.end)
        try:
            if act.verb == "wait":
                self.world.clock.advance(act.seconds)
            elif act.verb == "ray":
                node_provider, pending = self._node_provider(channel), dict[str, float]()
                until = self.world.clock.now() + act.seconds
                while self.world.clock.now() < until:
                    self._tick(node_provider, pending)
                    self.world.clock.advance(self.scenario.poll)
            else:
                provider = self._provider(channel)
                waits: dict[str, Callable[[], object]] = {
                    "start": lambda: provider.start(timeout=act.seconds, poll=self.scenario.poll),
                    "stop": lambda: provider.stop(timeout=act.seconds, poll=self.scenario.poll),
                    "status": provider.get_status,
                }
                waits[act.verb]()
        except (TPUError, Crash, KeyboardInterrupt):
            pass  # whatever ends an act, the next process begins with what it finds

    def _tick(self, provider: SliceNodeProvider, pending: dict[str, float]) -> None:
        """What Ray's autoscaler does with us every few seconds, as section 1 of its v2 reconciler has it: a listing that raises skips the
        tick, a launch that raises is launched again under another request, what is missing is launched and what is too many ended.
        """
        now, count = self.world.clock.now(), self.scenario.config.slices
        try:
            listed = provider.non_terminated_nodes(WORKER)
        except TPUError:
            return
        for name in [name for name, asked in pending.items() if name in listed or now - asked > 600.0]:
            del pending[name]
        missing = count - len(listed) - len(pending)
        if missing > 0:
            self.requests += 1
            request = f"request-{self.requests}"
            tags = {TAG_RAY_USER_NODE_TYPE: KIND, TAG_RAY_NODE_KIND: "worker", TAG_RAY_LAUNCH_REQUEST: request}
            try:
                provider.create_node({}, tags, missing)
            except TPUError:
                return
            pending.update(dict.fromkeys([slice_id("mine", request, index) for index in range(missing)], now))
        elif len(listed) > count:
            try:
                provider.terminate_nodes(sorted(listed)[: len(listed) - count])
            except TPUError:
                return

    def _happen(self, event: Event) -> None:
        cloud = self.world.cloud
        match event:
            case ("fault", values):
                cloud.faults.add(Fault.from_dict(values))
            case ("clear",):
                cloud.faults.clear()
            case ("capacity", zone, what, amount):
                cloud.set_capacity(zone, what, amount)
            case ("quota", place, amount, spot):
                cloud.set_quota(place, "v4", amount, spot=spot)
            case ("reachable", zone, reachable):
                cloud.set_reachable(zone, reachable)
            case ("lost", zone):  # the answer to a creation, and what would tell that it took effect
                cloud.faults.add(Fault(Effect.DROP_ANSWER, "Create*", zone=zone, count=1))
                cloud.faults.add(Fault(Effect.DROP, "Get*", zone=zone))
            case ("twin", zone, pick):
                self._ask_too(zone, f"mine-{pick % self.scenario.config.slices}")
            case (act, pick, *arguments):
                nodes = sorted(cloud._nodes)
                if nodes:
                    self._befall(act, nodes[pick % len(nodes)], arguments)

    def _ask_too(self, zone: str, name: str) -> None:
        """Another process of ours, started at the same time on another machine, asks for the same slice in some zone."""
        self.twins.add(name)
        with contextlib.suppress(TPUError):
            self._provider(self.world.channel(), patience=0.0).create_slice(name, zone=zone)

    def _befall(self, act: str, path: str, arguments: list[Any]) -> None:
        cloud = self.world.cloud
        acts: dict[str, Callable[..., Any]] = {
            "preempt": lambda notice: cloud.preempt(path, notice=notice),
            "maintain": lambda notice: cloud.maintain(path, notice=notice),
            "state": lambda state: cloud.set_node_state(path, state),
            "kill": lambda worker: cloud.kill_host(path, worker),
            "hang": lambda worker: cloud.hang_host(path, worker),
            "wake": lambda worker: cloud.wake_host(path, worker),
            "boot": lambda worker: cloud.boot_host(path, worker),
            "delete": lambda: cloud.delete_node(path),
        }
        with contextlib.suppress(Refusal):  # the node is in no state for that
            acts[act](*arguments)

    def _lift(self) -> None:
        cloud = self.world.cloud
        self.world.clock.advance(200.0)  # no event is later than that after the last act
        cloud.faults.clear()
        for key in list(cloud._limits._capacity):
            zone, what = key.split("/")
            cloud.set_capacity(zone, what, None)
        for key in list(cloud._limits._quota):
            place, generation, tier = key.split("/")
            cloud.set_quota(place, generation, None, spot=tier == "spot")
        for zone in cloud._limits.unreachable():
            cloud.set_reachable(zone, True)
        self.world.clock.advance(1000.0)  # what was announced has happened

    def _channel(self, end: End | None) -> Channel:
        channel = ended_channel(self.world, *([end] if end is not None else []))
        ending = channel.after

        def after(method: str, request: Any) -> None:
            if method.startswith("Create"):
                self._check_once()
            ending(method, request)

        channel.after = after
        return channel

    def _check_once(self) -> None:
        """No slice is alive in two zones at any time."""
        alive: dict[str, set[str]] = {}
        dead = {key for found in (self.world.nodes(), self.world.queued()) for key, state in found.items() if state in _DEAD}
        for zone, name in {*self.world.nodes(), *self.world.queued()} - dead:
            alive.setdefault(name, set()).add(zone)
        for name, zones in alive.items():
            if len(zones) > 1 and name not in self.twins:
                self.problems.append(f"{name} is alive in {sorted(zones)} at {self.world.clock.now():.0f}")

    def _provider(self, channel: Channel, patience: float = 60.0) -> TPUProvider:
        return self.world.provider(self.scenario.config, channel, patience=patience)

    def _node_provider(self, channel: Channel) -> SliceNodeProvider:
        config = self.scenario.config
        settings = host_settings(config, "127.0.0.9:1", SecretPlace(file="/token"))
        file = autoscaler_config(config, settings, Bundle("bundle-hash"), "0123456789ab")
        return SliceNodeProvider(file["provider"], config.name, self._provider(channel, PATIENCE_S))


def ended_channel(emulated: World, *ends: End) -> Channel:
    """The way to the API of a process that ends so. After a Crash nothing of it gets through any more."""
    channel = emulated.channel()
    dead = False

    def end(*, answered: bool) -> None:
        nonlocal dead
        if dead:
            raise Crash
        for one in ends:
            if (one.call, one.answered) == (channel.calls.total(), answered):
                dead = one.error is Crash
                raise one.error

    channel.before = lambda method, request: end(answered=False)
    channel.after = lambda method, request: end(answered=True)
    return channel


def play(scenario: Scenario) -> list[str]:
    """What was wrong."""
    with world(scenario.profile) as emulated:
        player = Player(scenario, emulated)
        player.play()
        try:
            player.finish()
        except TPUError as error:
            player.problems.append(f"{type(error).__name__}: {error}; nodes {emulated.nodes()}, queued {emulated.queued()}")
        return player.problems
