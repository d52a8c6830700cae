"""Ray's own autoscaler v2 over the emulated cloud, in one thread and in virtual time. No Ray cluster, no processes.

Real are: Ray's Autoscaler, Reconciler, InstanceManager, scheduler and NodeProviderAdapter, its reader of our autoscaler file, our node
provider, Google's client and the emulator. Put in their place are: the clock, the threads, and the GCS (`Gcs`), whose nodes follow the
hosts of the emulated slices and whose demand follows runs.
"""

import contextlib
import dataclasses
import itertools
import logging
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import yaml
from ray.autoscaler.v2 import autoscaler as ray_autoscaler
from ray.autoscaler.v2 import scheduler as ray_scheduler
from ray.autoscaler.v2.instance_manager import common, reconciler
from ray.autoscaler.v2.instance_manager import node_provider as ray_adapter
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig, FileConfigReader, InstanceReconcileConfig
from ray.autoscaler.v2.instance_manager.storage import InMemoryStorage
from ray.autoscaler.v2.instance_manager.subscribers import cloud_resource_monitor
from ray.core.generated import autoscaler_pb2, instance_manager_pb2

from cluster.autoscaler import autoscaler_config, host_settings, node_type, slice_resource
from cluster.config import ClusterConfig
from cluster.emulator.cloud import DELETING, PREEMPTED, READY
from cluster.emulator.model import NodeRecord
from cluster.emulator.profile import REALISTIC, Profile
from cluster.node_names import head_instance_id
from cluster.node_provider import TYPE_LABEL, SliceNodeProvider
from cluster.ray_nodes import RayNodes
from cluster.secret_place import SecretPlace
from cluster.vm.bundle import Bundle
from cluster.vm.head_agent import HeadSettings, head_environment
from tests.inprocess import Channel, World, world

_TIMED = (common, reconciler, ray_scheduler, ray_adapter, cloud_resource_monitor)
"""Where Ray reads the time: each has the module `time` in a global of that name."""
# Ray's generated modules publish no types.
_PB: Any = autoscaler_pb2
_RAY_STATUS = _PB.NodeStatus
_INSTANCE: Any = instance_manager_pb2
DEAD_KEPT_S = 600.0
"""So long the GCS still shows a dead node; it keeps a number of them, and a simulated day has few."""


class Later:
    """An executor whose work is done when the test says so, on its thread."""

    def __init__(self) -> None:
        self._work: deque[Callable[[], object]] = deque()

    def submit(self, function: Callable[..., object], *arguments: object) -> "Later":
        self._work.append(lambda: function(*arguments))
        return self

    def add_done_callback(self, callback: Callable[["Later"], None]) -> None:
        """Of the future that `submit` would return: nothing to do, errors come out of `run`."""

    def run(self) -> None:
        """Everything, also what is submitted meanwhile."""
        while self._work:
            self._work.popleft()()


@dataclass
class RayNode:
    """One host as the GCS knows it."""

    ray_id: bytes
    slice_uid: str
    slice_name: str
    worker: int
    node_type: str
    status: int
    idle_since: float
    ended: float = 0.0
    run: "Run | None" = None
    """Who holds its slice; of worker 0 only."""


@dataclass(eq=False)
class Run:
    """Somebody who wants slices for a while, all at once, and loses what it did not finish when one of them goes."""

    slices: int
    seconds: float
    node_type: str
    done: float = 0.0
    waited: float = 0.0
    """Seconds without its slices since it last had them."""


class Gcs:
    """The GCS as the autoscaler sees it, and as our node provider does: nodes that live where hosts are up, and placement groups."""

    address = "127.0.0.9:6379"

    def __init__(self, world: World, config: ClusterConfig, chance: random.Random) -> None:
        self.world, self.config, self._chance = world, config, chance
        self.resources = {node_type(kind): slice_resource(kind) for kind in config.types}
        """Of each node type, the custom resource that stands for a slice."""
        self.hosts = {node_type(kind): kind.hosts_per_slice for kind in config.types}
        self.boot_s, self.heartbeat_s = 60.0, 20.0
        self.runs: list[Run] = []
        self.nodes: dict[tuple[str, int], RayNode] = {}
        self.sick: set[tuple[str, int]] = set()
        """(uid of the slice, worker) of hosts that do not run Ray, whatever the API says."""
        self.finished: list[Run] = []
        self._ready_since: dict[str, float] = {}
        self._gone_since: dict[tuple[str, int], float] = {}
        self._versions = itertools.count(1)
        self._last = world.clock.now()
        self.head_up = True
        self.boot_of: dict[str, float] = {}
        self.clusters = {config.name}

    # ---- what happens by itself

    def follow(self) -> None:
        """Let nodes and runs follow the emulated hosts up to now."""
        now = self.world.clock.now()
        up = self._hosts_up(now)
        for key, node in up.items():
            if key not in self.nodes:
                self._join(key, node, now)
        for key, known in list(self.nodes.items()):
            if known.status != _RAY_STATUS.DEAD and key not in up:
                gone = self._gone_since.setdefault(key, now)
                if now - gone >= self.heartbeat_s or known.status == _RAY_STATUS.DRAINING:
                    self._die(known, now)
            else:
                self._gone_since.pop(key, None)
            if known.status == _RAY_STATUS.DRAINING and known.run is None and key in up:
                self._die(known, now)  # an idle node that is drained ends
                self.sick.add(key)
            if known.status == _RAY_STATUS.DEAD and now - known.ended > DEAD_KEPT_S and known.slice_uid not in self._uids():
                del self.nodes[key]
        self._work(now - self._last, now)
        self._last = now

    def _uids(self) -> set[str]:
        return {node.uid for node in self.world.cloud._nodes.values()}

    def _hosts_up(self, now: float) -> dict[tuple[str, int], NodeRecord]:
        up: dict[tuple[str, int], NodeRecord] = {}
        for node in self.world.cloud._nodes.values():
            if node.message.labels["podlaunch-cluster"] not in self.clusters:
                continue
            if node.message.state != READY:
                self._ready_since.pop(node.uid, None)
                continue
            since = self._ready_since.setdefault(node.uid, now)
            if now - since < self.boot_of.get(node.uid, self.boot_s):
                continue
            up |= {(node.uid, host.worker): node for host in node.hosts if (node.uid, host.worker) not in self.sick and not host.held}
        return up

    def _join(self, key: tuple[str, int], node: NodeRecord, now: float) -> None:
        ray_id = self._chance.randbytes(28)
        kind = node.message.labels[TYPE_LABEL]
        self.nodes[key] = RayNode(ray_id, node.uid, node.node_id, key[1], kind, _RAY_STATUS.RUNNING, now)

    def _die(self, node: RayNode, now: float) -> None:
        node.status, node.ended = _RAY_STATUS.DEAD, now
        if node.run is not None:
            node.run = None

    # ---- runs

    def held(self, run: Run) -> list[RayNode]:
        return [node for node in self.nodes.values() if node.run is run]

    def pending(self, run: Run) -> int:
        """How many slices it still waits for: one that a host is missing of is held and of no use."""
        return run.slices - len(self.held(run))

    def alive_workers(self, slice_uid: str) -> set[int]:
        return {node.worker for node in self.nodes.values() if node.slice_uid == slice_uid and node.status != _RAY_STATUS.DEAD}

    def complete(self, run: Run) -> bool:
        held = self.held(run)
        return len(held) == run.slices and all(len(self.alive_workers(node.slice_uid)) == self.hosts[node.node_type] for node in held)

    def _work(self, seconds: float, now: float) -> None:
        for run in list(self.runs):
            for node in self._free(run.node_type)[: self.pending(run)]:
                node.run = run
            if self.complete(run):
                run.done, run.waited = run.done + seconds, 0.0
            else:
                run.waited += seconds
            if run.done >= run.seconds:
                self.end(run)
                self.finished.append(run)

    def end(self, run: Run) -> None:
        """It wants nothing any more, done or not."""
        self.runs.remove(run)
        for node in self.held(run):
            node.run, node.idle_since = None, self.world.clock.now()

    def _free(self, kind: str) -> list[RayNode]:
        return [
            node
            for node in self.nodes.values()
            if node.worker == 0 and node.run is None and node.status == _RAY_STATUS.RUNNING and node.node_type == kind
        ]

    def wanted(self) -> int:
        return sum(run.slices for run in self.runs)

    # ---- as Ray's GcsClient

    def get_cluster_resource_state(self) -> bytes:
        reply = _PB.GetClusterResourceStateReply()
        state = reply.cluster_resource_state
        state.cluster_resource_state_version = next(self._versions)
        if self.head_up:
            head = state.node_states.add(node_id=b"h" * 28, instance_id=head_instance_id(self.config.name), ray_node_type_name="head")
            head.status, head.total_resources["node:__internal_head__"] = _RAY_STATUS.RUNNING, 1.0
        for node in self.nodes.values():
            self._describe(node, state.node_states.add())
        for number, run in enumerate(self.runs):
            if self.pending(run) > 0:
                self._ask(run, number, state.pending_gang_resource_requests.add())
        data: bytes = reply.SerializeToString()
        return data

    def _describe(self, node: RayNode, message: Any) -> None:
        message.node_id, message.status = node.ray_id, node.status
        message.labels["ray.io/tpu-slice-name"], message.labels["ray.io/tpu-worker-id"] = node.slice_name, str(node.worker)
        if node.worker == 0:
            message.instance_id, message.ray_node_type_name = node.slice_name, node.node_type
            message.total_resources[self.resources[node.node_type]] = 1.0
            message.available_resources[self.resources[node.node_type]] = 0.0 if node.run is not None else 1.0
        if node.status == _RAY_STATUS.RUNNING and node.run is None:
            message.idle_duration_ms = int((self.world.clock.now() - node.idle_since) * 1000)
            message.status = _RAY_STATUS.IDLE

    def _ask(self, run: Run, number: int, message: Any) -> None:
        """A STRICT_SPREAD placement group of one bundle a slice, those bundles that have no node."""
        for _ in range(self.pending(run)):
            request = message.requests.add()
            request.resources_bundle[self.resources[run.node_type]] = 1.0
            constraint = request.placement_constraints.add()
            constraint.anti_affinity.label_name, constraint.anti_affinity.label_value = f"_PG_{number}", ""

    def drain_node(self, node_id: str, reason: int, reason_message: str, deadline_timestamp_ms: int) -> tuple[bool, str]:
        found = self._find(bytes.fromhex(node_id))
        if found is None or found.run is not None or found.status == _RAY_STATUS.DEAD:
            return False, "not idle any more"
        found.status = _RAY_STATUS.DRAINING
        return True, ""

    def drain_nodes(self, node_ids: list[bytes]) -> list[bytes]:
        found = [node for ray_id in node_ids if (node := self._find(ray_id)) is not None and node.status != _RAY_STATUS.DEAD]
        for node in found:
            self._die(node, self.world.clock.now())
            self.sick.add((node.slice_uid, node.worker))
        return [node.ray_id for node in found]

    def _find(self, ray_id: bytes) -> RayNode | None:
        return next((node for node in self.nodes.values() if node.ray_id == ray_id), None)


class _Reader:
    """Ray's reader of the file, which is read once: it does not change here, and to parse it takes longer than a tick."""

    def __init__(self, path: Path) -> None:
        self._config = FileConfigReader(str(path)).get_cached_autoscaling_config()

    def get_cached_autoscaling_config(self) -> AutoscalingConfig:
        return self._config

    def refresh_cached_autoscaling_config(self) -> None:
        """Nothing new."""


class _Autoscaler(ray_autoscaler.Autoscaler):
    """Ray's, with our provider given instead of imported by its name, and without threads."""

    def __init__(self, provider: SliceNodeProvider, reader: _Reader, gcs: Gcs, launch_batch: int) -> None:
        self._given, self._launch_batch = provider, launch_batch
        self.main, self.launches, self.stops = Later(), Later(), Later()
        untyped: Any = reader
        super().__init__("session", untyped, gcs)
        manager: Any = self._instance_manager
        self.manager = manager
        for subscriber in manager._status_update_subscribers:
            if hasattr(subscriber, "_executor"):
                subscriber._executor.shutdown()
                subscriber._executor = self.stops

    def _init_cloud_instance_provider(self, config: AutoscalingConfig, config_reader: Any) -> None:
        adapter: Any = ray_adapter.NodeProviderAdapter(self._given, config_reader, max_launch_batch_per_type=self._launch_batch)
        adapter._main_executor.shutdown()
        adapter._node_launcher_executors.shutdown()
        adapter._main_executor, adapter._node_launcher_executors = self.main, self.launches
        self._cloud_instance_provider = adapter


@dataclass
class Simulation:
    """One head's autoscaler over the world. A second one over the same world is another cluster, or the same after a crash of its head."""

    world: World
    config: ClusterConfig
    gcs: Gcs
    folder: Path
    tick_s: float = 5.0
    channel: Channel = field(init=False)
    provider: SliceNodeProvider = field(init=False)
    autoscaler: _Autoscaler = field(init=False)
    threads: Later = field(init=False)
    skipped: int = 0
    """Ticks that a listing's failure has cost."""
    state: Any = None
    """What Ray reported last: google.protobuf AutoscalingState, or None when the tick was skipped."""

    def __post_init__(self) -> None:
        self.start_head()

    def start_head(self) -> None:
        """A head without memory: Ray's autoscaler and our provider begin anew."""
        settings = host_settings(self.config, "127.0.0.9:1", SecretPlace(file="/token"))
        file = self.folder / f"autoscaler-{self.config.name}.yaml"
        file.write_text(yaml.safe_dump(autoscaler_config(self.config, settings, Bundle("bundle-hash"), "0123456789ab")))
        self.channel, self.threads = self.world.channel(), Later()
        slices = self.world.provider(self.config.of_type(None), self.channel, patience=10.0)
        written = yaml.safe_load(file.read_text())["provider"]
        now = self.world.clock.now
        nodes = RayNodes(lambda: self.gcs, now)
        self.provider = SliceNodeProvider(written, self.config.name, slices, clock=now, submit=self.threads.submit, ray_nodes=nodes)
        self.autoscaler = _Autoscaler(self.provider, _Reader(file), self.gcs, launch_batch=5)

    def tick(self) -> None:
        """One tick of Ray's monitor, and what its threads and ours do until the next one."""
        self.gcs.follow()
        self.state = self.autoscaler.update_autoscaling_state()
        self.skipped += self.state is None
        self.settle()
        self.world.clock.advance(self.tick_s)

    def settle(self) -> None:
        for executor in (self.autoscaler.main, self.autoscaler.launches, self.autoscaler.stops, self.threads):
            executor.run()

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Tick for so long, or until it is so; whether it is."""
        end = self.world.clock.now() + seconds
        while not until():
            if self.world.clock.now() >= end:
                return False
            self.tick()
        return True

    # ---- what there is

    def instances(self) -> dict[str, int]:
        """Ray's instances that have not ended, by id of the slice (or of the instance), with their status; without the head."""
        found, _ = self.autoscaler.manager._instance_storage.get_instances()
        ended = (_INSTANCE.Instance.TERMINATED, _INSTANCE.Instance.ALLOCATION_FAILED)
        head = head_instance_id(self.config.name)
        return {
            item.cloud_instance_id or item.instance_id: item.status
            for item in found.values()
            if item.status not in ended and item.cloud_instance_id != head
        }

    def records(self) -> int:
        """All that Ray remembers, ended ones included."""
        return len(self.autoscaler.manager._instance_storage.get_instances()[0])

    def standing(self) -> list[tuple[str, str]]:
        """(zone, name) of what this cluster has in the cloud and nobody deletes yet: it costs, or will."""
        dead = {"FAILED", "SUSPENDED", "SUSPENDING", "DELETING"}
        states, nodes = self.world.queued(), self.world.cloud._nodes
        mine = f"{self.config.name}-"
        found = {key for key, state in states.items() if state not in dead}
        for node in nodes.values():
            key = (node.zone, node.node_id)
            lost = node.message.state in (DELETING, PREEMPTED) or states.get(key) in dead
            (found.discard if lost else found.add)(key)
        return sorted(key for key in found if key[1].startswith(mine))

    def everything(self) -> list[tuple[str, str]]:
        """Whatever is left of this cluster's slices, in any state."""
        keys = {*self.world.queued(), *((node.zone, node.node_id) for node in self.world.cloud._nodes.values())}
        return sorted(key for key in keys if key[1].startswith(f"{self.config.name}-"))


@contextlib.contextmanager
def ray_time(clock: Any) -> Iterator[None]:
    """Ray's autoscaler reads this clock, and the settings that our head agent gives it in its environment."""
    shim = SimpleNamespace(
        time=clock.now, monotonic=clock.now, time_ns=lambda: int(clock.now() * 1e9), sleep=clock.sleep, perf_counter=clock.now
    )
    with contextlib.ExitStack() as stack:
        for module in _TIMED:
            if hasattr(module, "time"):
                stack.enter_context(mock.patch.object(module, "time", shim))
        env = head_settings_environment()
        answers = {
            "get_instance_reconcile_config": reconcile_settings(env),
            "get_pending_idle_timeout_s": float(env["RAY_AUTOSCALER_PENDING_NODE_IDLE_TIMEOUT_S"]),
            "get_max_concurrent_launches": int(env["AUTOSCALER_MAX_CONCURRENT_LAUNCHES"]),
        }
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(AutoscalingConfig, name, return_value=answer))
        stack.enter_context(mock.patch.object(InMemoryStorage, "get_all", _get_all))
        yield


@contextlib.contextmanager
def simulation(
    config: ClusterConfig, folder: Path, *, profile: Profile = REALISTIC, seed: int = 0, tick_s: float = 5.0
) -> Iterator[Simulation]:
    """One cluster over a world of its own, without logging: it takes longer than the rest."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with world(profile) as made, ray_time(made.clock):
            yield Simulation(made, config, Gcs(made, config, random.Random(seed)), folder, tick_s)
    finally:
        logging.disable(before)


def _get_all(storage: InMemoryStorage, table: str) -> Any:
    """As Ray's, which copies immutable values deeply and takes most of a tick for that."""
    return dict(storage._tables[table]), storage._version


def head_settings_environment() -> dict[str, str]:
    """What the head agent tells Ray."""
    values = {item.name: 1 if item.type is int else "x" for item in dataclasses.fields(HeadSettings)}
    return head_environment(HeadSettings(**values))  # type: ignore[arg-type]  # by the fields' types


def reconcile_settings(env: Mapping[str, str]) -> InstanceReconcileConfig:
    """Ray reads these once, when it is imported; here they are what the head agent sets."""
    prefix = "RAY_AUTOSCALER_RECONCILE_"
    known = {item.name: f"{prefix}{item.name.upper()}" for item in dataclasses.fields(InstanceReconcileConfig)}
    return InstanceReconcileConfig(**{name: int(env[variable]) for name, variable in known.items() if variable in env})
