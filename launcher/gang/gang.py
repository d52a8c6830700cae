"""The gang of one run on Ray: its slices, its runners, their children. All that the supervisor needs of Ray is here."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.core.generated import autoscaler_pb2
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ClusterConfig
from cluster.secret_place import SecretPlace
from cluster.tpu.losses import read_ready
from cluster.vm.head_watch import accepts
from launcher.gang.child import Event
from launcher.gang.gauges import HostGauges
from launcher.gang.lease import EVENT_WAIT_S, LEASE_S
from launcher.gang.placement import Host, dead, incomplete, living_hosts, process_environment
from launcher.gang.runner import Runner
from launcher.profiles import ProfileRequest
from launcher.runs import RunDirectory

HOSTS_INTERVAL_S = 1.0
"""How often the hosts are looked at while runners are to answer."""
DRAIN_LIMIT_S = 60.0
"""What is still on a slice that was given up may be ended after this."""


# What Ray says of an actor whose process or host is gone. OutOfMemoryError: its memory monitor ended the worker.
_LOST = (RayActorError, NodeDiedError, OutOfMemoryError)


class Gang:
    """Slices are reserved first, then hosts appear, then runners are placed on them."""

    def __init__(self, directory: RunDirectory, config: ClusterConfig, slice_resource: str, secrets: SecretPlace | None) -> None:
        kind = config.accelerator
        self._peak_flops = kind.peak_bf16_tflops * 1e12 * kind.chips * config.slices
        self._directory = directory
        self._config = config
        self._slice_resource = slice_resource
        self._secrets = secrets
        self._groups: list[PlacementGroup] = []
        self._runners: list[Any] = []
        self._pending: dict[Any, int] = {}
        self._doubtful: set[str] = set()
        """Ray's ids of hosts that have lost their runner: Ray goes on to call a dead host alive for seconds."""
        self.hosts: list[Host] = []
        self.incomplete: list[str] = []
        """Slices that were reserved and lack hosts, as `find_hosts` saw it last."""

    def reserve(self) -> PlacementGroup:
        """Ask for the run's slices; pending, this is the demand that makes the autoscaler create them."""
        group: PlacementGroup = placement_group(
            [{self._slice_resource: 1}] * self._config.slices, strategy="STRICT_SPREAD", name=self._name("slices")
        )
        self._groups.append(group)
        return group

    def reserved(self, group: PlacementGroup, timeout: int) -> bool:
        """Whether the slices are there; waits up to `timeout` seconds for them. Whole ones: Ray cuts off the rest, and 0 never waits."""
        return bool(group.wait(timeout))

    def boots(self) -> bool:
        """Whether a slice of this kind is there whose hosts have not all joined: then it is no longer capacity that is waited for."""
        names = [name for name, kind in read_ready(self._config.name).items() if kind == self._config.accelerator.name]
        return bool(incomplete(living_hosts(_nodes(), names), names, self._config.hosts_per_slice))

    def find_hosts(self, group: PlacementGroup) -> bool:
        """Learn the hosts of the reserved slices. False while some have not joined yet."""
        nodes = [node for node in _nodes() if node["NodeID"] not in self._doubtful or _answers(node)]
        held = set(ray.util.placement_group_table(group)["bundles_to_node_id"].values())
        slices = {(node.get("Labels") or {}).get("ray.io/tpu-slice-name") for node in nodes if node["NodeID"] in held}
        names = sorted(name for name in slices if name)
        self.hosts = living_hosts(nodes, names)
        self.incomplete = incomplete(self.hosts, names, self._config.hosts_per_slice)
        return len(names) == self._config.slices and not self.incomplete

    def place(self, attempt: int) -> None:
        """Start one runner a host, holding all its chips. `attempt`: the first that they serve, part of their names in Ray's dashboard, and
        begun there ahead.
        """
        chips = self._config.accelerator.chips_per_host
        bundles = [{"TPU": float(chips)} for _ in self.hosts]
        group = placement_group(
            bundles, strategy="PACK", name=self._name("gang"), bundle_label_selector=[host.selector for host in self.hosts]
        )
        self._groups.append(group)
        actor = ray.remote(Runner)
        self._runners = [
            actor.options(
                name=self._name(f"{attempt}/{host.name}"),
                num_cpus=0,
                resources={"TPU": chips},
                max_concurrency=4,
                enable_task_events=False,  # questions for events, all day long: nobody wants them among the tasks in Ray's dashboard
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            ).remote(
                self._directory.url,
                index,
                LEASE_S,
                functools.partial(HostGauges, self._directory.run_id, self._config.name, host.name),
                first=attempt,
            )
            for index, host in enumerate(self.hosts)
        ]

    def start(self, attempt: int, timeout: float) -> list[int]:
        """Start one training process a host; their process ids there. Raises GangLost when a host does not answer, OSError when a process
        cannot start.
        """
        self._pending = {}
        port, megascale_port = self._ask([self._runners[0].free_ports.remote(2)], timeout)[0]
        calls = [
            runner.start.remote(
                attempt,
                {
                    "PODLAUNCH_PEAK_FLOPS": str(self._peak_flops),
                    **process_environment(self.hosts, index, port, megascale_port),
                },
                self._directory.log_name(attempt, index),
                None if self._secrets is None else self._secrets.to_json(),
            )
            for index, runner in enumerate(self._runners)
        ]
        return self._ask(calls, timeout, meanwhile=self._renew)

    def poll(self, timeout: float) -> list[tuple[int, Event]]:
        """(host index, event) of whatever was said within `timeout` seconds. A lost runner says `lost`."""
        waiting = set(self._pending.values())
        for index, runner in enumerate(self._runners):
            if index not in waiting:
                self._pending[runner.next_events.remote(EVENT_WAIT_S)] = index
        ray.wait(list(self._pending), num_returns=1, timeout=timeout)
        ready, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)
        found: list[tuple[int, Event]] = []
        for reference in ready:
            index = self._pending.pop(reference)
            try:
                found += [(index, event) for event in ray.get(reference)]
            except _LOST as error:
                self._doubtful.add(self.hosts[index].node_id)
                words = f"the host's runner is gone: {_first_line(error)}"
                found.append((index, {"event": "lost", "error": words, "preempted": getattr(error, "preempted", False)}))
        return found

    def stacks(self, timeout: float) -> list[str | None]:
        """What each host's process is doing, in words (stacks.py); None where the host does not answer within `timeout` seconds."""
        calls = [runner.stacks.remote() for runner in self._runners]
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=timeout)
        found: list[str | None] = []
        for call in calls:
            try:
                found.append(ray.get(call) if call in ready else None)
            except _LOST:
                found.append(None)
        return found

    def profile(self, request: ProfileRequest) -> None:
        """Ask every training process to trace its next steps; they answer by events."""
        for runner in self._runners:
            runner.profile.remote(request.to_json())

    def terminate(self) -> None:
        """Ask every training process to checkpoint and end."""
        for runner in self._runners:
            runner.terminate.remote()

    def kill(self, timeout: float) -> None:
        """End every training process at once; their peers would hang in a collective. Raises GangLost when a host does not answer."""
        self._ask([runner.kill.remote() for runner in self._runners], timeout)

    def replace(self, slices: Sequence[str], reason: str) -> None:
        """Give up these slices: their workers 0 are drained for good, so that the autoscaler deletes the slices once they are released."""
        nodes = _nodes()
        client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)  # type: ignore[attr-defined]  # a compiled module
        preemption = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore[attr-defined]  # generated
        for host in living_hosts(nodes, slices):
            if host.worker_id == 0:
                deadline_ms = int((time.time() + DRAIN_LIMIT_S) * 1000)
                client.drain_node(host.node_id, preemption, reason, deadline_ms)

    def release(self) -> None:
        """Give runners and slices back."""
        for runner in self._runners:
            ray.kill(runner)
        for group in reversed(self._groups):
            remove_placement_group(group)
        self._runners, self._groups, self._pending, self.hosts, self.incomplete = [], [], {}, [], []

    def _renew(self) -> None:
        """Hosts that are ready before the others are told that their supervisor lives."""
        for runner in self._runners:
            runner.renew.remote()

    def _ask(self, calls: Sequence[Any], timeout: float, meanwhile: Callable[[], None] = lambda: None) -> list[Any]:
        """The answers of all runners. Ends as soon as one is lost: what is to be placed on a dead host would wait for ever."""
        deadline = time.monotonic() + timeout
        try:
            while (left := deadline - time.monotonic()) > 0:
                answered, open_calls = ray.wait(list(calls), num_returns=len(calls), timeout=min(HOSTS_INTERVAL_S, left))
                ray.get(answered)  # raises for whoever is lost already
                if not open_calls:
                    break
                if gone := dead(self.hosts, _nodes()):
                    raise GangLost(f"host {gone[0].name} died before its runner answered")
                meanwhile()
            return list(ray.get(list(calls), timeout=0))
        except RayTaskError as error:
            raise error.as_instanceof_cause() from error  # type: ignore[no-untyped-call]  # the same
        except (*_LOST, ray.exceptions.GetTimeoutError) as error:
            raise GangLost(_first_line(error)) from error

    def _name(self, part: str) -> str:
        return f"{self._directory.run_id}/{part}"


class GangLost(Exception):
    """A host of the gang does not answer; new hosts are needed."""


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray leaves it untyped
    return nodes


def _answers(node: dict[str, Any]) -> bool:
    """Whether Ray's daemon on that host takes connections."""
    return accepts(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0]
