"""The gang of one run on Ray: its slices, its runners, their children. All that the supervisor needs of Ray is here."""

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ClusterConfig
from cluster.secret_place import SecretPlace
from launcher.gang.placement import Host, complete, living_hosts, process_environment
from launcher.gang.runner import Event, Runner
from launcher.runs import RunDirectory

EVENT_WAIT_S = 20.0
"""How long a runner holds a question for events before it answers with none."""


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
        self.hosts: list[Host] = []

    def reserve(self) -> PlacementGroup:
        """Ask for the run's slices; pending, this is the demand that makes the autoscaler create them."""
        group: PlacementGroup = placement_group(
            [{self._slice_resource: 1}] * self._config.slices, strategy="STRICT_SPREAD", name=self._name("slices")
        )
        self._groups.append(group)
        return group

    def reserved(self, group: PlacementGroup, timeout: float) -> bool:
        """Whether the slices are there; waits up to `timeout` seconds for them."""
        return bool(group.wait(timeout))

    def find_hosts(self, group: PlacementGroup) -> bool:
        """Learn the hosts of the reserved slices. False while some have not joined yet."""
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray leaves it untyped
        held = set(ray.util.placement_group_table(group)["bundles_to_node_id"].values())
        slices = {(node.get("Labels") or {}).get("ray.io/tpu-slice-name") for node in nodes if node["NodeID"] in held}
        self.hosts = living_hosts(nodes, [name for name in slices if name])
        return complete(self.hosts, self._config.slices, self._config.hosts_per_slice)

    def place(self) -> None:
        """Start one runner a host, holding all its chips."""
        chips = self._config.accelerator.chips_per_host
        bundles = [{"TPU": float(chips)} for _ in self.hosts]
        group = placement_group(
            bundles, strategy="PACK", name=self._name("gang"), bundle_label_selector=[host.selector for host in self.hosts]
        )
        self._groups.append(group)
        actor = ray.remote(Runner)
        self._runners = [
            actor.options(
                name=self._name(f"host-{index}"),
                num_cpus=0,
                resources={"TPU": chips},
                max_concurrency=4,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            ).remote(str(self._directory.path), index)
            for index in range(len(self.hosts))
        ]

    def start(self, attempt: int, timeout: float) -> None:
        """Start one training process a host. Raises GangLost when a host does not answer, OSError when a process cannot start."""
        port, megascale_port = self._ask([self._runners[0].free_ports.remote(2)], timeout)[0]
        calls = [
            runner.start.remote(
                attempt,
                {
                    "PODLAUNCH_PEAK_FLOPS": str(self._peak_flops),
                    **process_environment(self.hosts, index, port, megascale_port),
                },
                str(self._directory.log(attempt, index)),
                None if self._secrets is None else self._secrets.to_json(),
            )
            for index, runner in enumerate(self._runners)
        ]
        self._ask(calls, timeout)
        self._pending = {}

    def poll(self, timeout: float) -> list[tuple[int, Event]]:
        """(host index, event) of whatever was said within `timeout` seconds. A lost runner says `lost`."""
        waiting = set(self._pending.values())
        for index, runner in enumerate(self._runners):
            if index not in waiting:
                self._pending[runner.next_events.remote(EVENT_WAIT_S)] = index
        ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=timeout)
        found: list[tuple[int, Event]] = []
        for reference in ready:
            index = self._pending.pop(reference)
            try:
                found += [(index, event) for event in ray.get(reference)]
            except RayActorError as error:
                found.append((index, {"event": "lost", "error": f"the host's runner is gone: {_first_line(error)}"}))
        return found

    def terminate(self) -> None:
        """Ask every training process to checkpoint and end."""
        for runner in self._runners:
            runner.terminate.remote()

    def kill(self, timeout: float) -> None:
        """End every training process at once; their peers would hang in a collective. Raises GangLost when a host does not answer."""
        self._ask([runner.kill.remote() for runner in self._runners], timeout)

    def release(self) -> None:
        """Give runners and slices back."""
        for runner in self._runners:
            ray.kill(runner)
        for group in reversed(self._groups):
            remove_placement_group(group)
        self._runners, self._groups, self._pending, self.hosts = [], [], {}, []

    def _ask(self, calls: Sequence[Any], timeout: float) -> list[Any]:
        try:
            return list(ray.get(list(calls), timeout=timeout))
        except RayTaskError as error:
            raise error.as_instanceof_cause() from error  # type: ignore[no-untyped-call]  # the same
        except (RayActorError, ray.exceptions.GetTimeoutError) as error:
            raise GangLost(_first_line(error)) from error

    def _name(self, part: str) -> str:
        return f"{self._directory.run_id}/{part}"


class GangLost(Exception):
    """A host of the gang does not answer; new hosts are needed."""


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0]
