"""A day of bad luck for a simulated cluster, by one seed, and what must hold at every tick of it."""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.emulator.cloud import CREATING, READY
from cluster.emulator.faults import TPU_PRESETS, Effect, Fault
from cluster.node_provider import STANDING
from tests.inprocess import Failure
from tests.simulated_ray import Run, Simulation

HOUR = 3600.0


@dataclass
class Storm:
    """What befalls the cloud and who wants slices of it. `strike` once a tick; `calm` ends it."""

    sim: Simulation
    chance: random.Random
    node_type: str
    log: list[str] = field(default_factory=list)
    _until: list[tuple[float, Callable[[], Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sim.channel.before = self._before
        self._page_fails = False
        self._per_hour: list[tuple[float, Callable[[], object]]] = [
            (2.0, self._run),
            (0.3, self._cancel),
            (3.0, self._preempt),
            (0.5, self._maintain),
            (1.0, self._host_dies),
            (0.5, self._slice_lies),
            (0.7, self._stockout),
            (0.4, self._quota),
            (0.7, self._unreachable),
            (1.5, self._api_fault),
            (0.5, self._second_page),
            (0.05, self._head_restarts),
        ]

    def strike(self) -> None:
        now = self.sim.world.clock.now()
        for when, undo in [item for item in self._until if item[0] <= now]:
            self._until.remove((when, undo))
            undo()
        for rate, happen in self._per_hour:
            if self.chance.random() < rate * self.sim.tick_s / HOUR:
                self.log.append(f"{now - 1_000_000:.0f} {getattr(happen, '__name__', '')} {happen() or ''}")

    def calm(self) -> None:
        for _, undo in self._until:
            undo()
        self._until.clear()
        self.sim.world.cloud.faults.clear()

    def _for(self, shortest: float, longest: float, undo: Callable[[], Any]) -> None:
        self._until.append((self.sim.world.clock.now() + self.chance.uniform(shortest, longest), undo))

    def _before(self, method: str, request: Any) -> None:
        """Pages are short, so that there are several; and the second one may fail."""
        if method in ("ListNodes", "ListQueuedResources"):
            request.page_size = 2
            if self._page_fails and request.page_token:
                raise Failure(14, "The service is currently unavailable.")

    def _zone(self) -> str:
        return self.chance.choice(self.sim.config.zones)

    def _node(self, *states: int) -> Any:
        nodes = [node for node in self.sim.world.cloud._nodes.values() if node.message.state in states]
        return self.chance.choice(nodes) if nodes else None

    def _run(self) -> None:
        self.sim.gcs.runs.append(Run(self.chance.randint(1, 3), self.chance.uniform(600, 5400), self.node_type))

    def _cancel(self) -> None:
        if self.sim.gcs.runs:
            self.sim.gcs.end(self.chance.choice(self.sim.gcs.runs))

    def _preempt(self) -> str:
        if node := self._node(READY, CREATING):
            self.sim.world.cloud.preempt(node.path, notice=self.chance.choice([0.0, 30.0]))
            return str(node.node_id)
        return ""

    def _maintain(self) -> str:
        if node := self._node(READY):
            self.sim.world.cloud.maintain(node.path, notice=self.chance.choice([0.0, 60.0]))
            return str(node.node_id)
        return ""

    def _host_dies(self) -> str:
        if node := self._node(READY):
            worker = self.chance.randrange(len(node.hosts))
            self.sim.gcs.sick.add((node.uid, worker))
            return f"{node.node_id}/{worker}"
        return ""

    def _slice_lies(self) -> str:
        """All hosts are gone and the API goes on to say READY."""
        if node := self._node(READY):
            self.sim.gcs.sick |= {(node.uid, host.worker) for host in node.hosts}
            return str(node.node_id)
        return ""

    def _stockout(self) -> None:
        zone, cloud = self._zone(), self.sim.world.cloud
        cloud.set_capacity(zone, "*", 0)
        self._for(300, 2 * HOUR, lambda: cloud.set_capacity(zone, "*", None))

    def _quota(self) -> None:
        region, cloud = self._zone().rpartition("-")[0], self.sim.world.cloud
        generation = self.sim.config.accelerator.generation
        cloud.set_quota(region, generation, 0, spot=True)
        self._for(300, HOUR, lambda: cloud.set_quota(region, generation, None, spot=True))

    def _unreachable(self) -> None:
        zone, cloud = self._zone(), self.sim.world.cloud
        cloud.set_reachable(zone, False)
        self._for(10, 1200, lambda: cloud.set_reachable(zone, True))

    def _api_fault(self) -> str:
        method = self.chance.choice(["*", "Create*", "Delete*", "List*", "GetOperation"])
        seed = self.chance.getrandbits(30)
        faults = [
            Fault(Effect.ERROR, method, probability=0.5, seed=seed),
            Fault(Effect.DROP, method, probability=0.5, seed=seed),
            Fault(Effect.DROP_ANSWER, method, probability=0.5, seed=seed),
            Fault(Effect.LATENCY, method, seconds=self.chance.uniform(1, 40), probability=0.2, seed=seed),
            TPU_PRESETS["stockout"],
            TPU_PRESETS["internal"],
            TPU_PRESETS["rate"],
            TPU_PRESETS["permission"],
        ]
        fault = self.chance.choice(faults)
        rules = self.sim.world.cloud.faults
        number = rules.add(fault)
        self._for(10, 900, lambda: rules.remove(number))
        return f"{fault.effect.value} {fault.method} {fault.code}"

    def _second_page(self) -> None:
        def heal() -> None:
            self._page_fails = False

        self._page_fails = True
        self._for(5, 300, heal)

    def _head_restarts(self) -> None:
        self.sim.start_head()
        self.sim.channel.before = self._before


@dataclass
class Watch:
    """What must hold at every tick. Raises AssertionError."""

    sim: Simulation
    most: int
    wanted: deque[int] = field(default_factory=lambda: deque(maxlen=4))
    seen: set[str] = field(default_factory=set)
    peak: int = 0
    made: int = 0

    def look(self) -> None:
        self.wanted.append(self.sim.gcs.wanted())
        names = {name for _, name in self.sim.standing()}
        self.peak = max(self.peak, len(names))
        assert len(names) <= self.most, f"{sorted(names)} stand, at most {self.most} may"
        fresh, self.seen = names - self.seen, self.seen | names
        self.made += len(fresh)
        if fresh:
            useful = names - self.given_up()
            assert len(useful) <= max(self.wanted), f"{sorted(fresh)} made although {max(self.wanted)} are wanted: {sorted(useful)}"

    def given_up(self) -> set[str]:
        """What Ray does not count on any more and the service still has."""
        shown = self.sim.provider._shown
        lost = {name for name, item in self.sim.provider._standing.items() if item.life not in STANDING}
        return {*self.sim.provider._doomed, *lost, *({name for _, name in self.sim.standing()} - shown.keys())}
