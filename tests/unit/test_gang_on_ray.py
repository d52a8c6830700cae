"""What the gang does when hosts die that Ray still calls alive. Ray itself is a table of nodes and a queue of answers here."""

import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from cluster.config import ClusterConfig
from launcher.gang import gang as module
from launcher.gang.gang import Gang, GangLost
from launcher.gang.placement import SLICE_LABEL, WORKER_LABEL
from launcher.runs import RunDirectory

NEVER = object()


class FakeRay:
    """`answers`: what a call returns or raises, NEVER for one that stays open."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        self.table: list[dict[str, Any]] = []
        self.answers: dict[object, Any] = {}
        self.dies: dict[str, Any] | None = None
        """The node that Ray calls dead from the next wait on."""
        self.util = SimpleNamespace(placement_group_table=lambda group: {"bundles_to_node_id": {0: group}})

    def nodes(self) -> list[dict[str, Any]]:
        return self.table

    def wait(self, calls: list[object], *, num_returns: int, timeout: float) -> tuple[list[object], list[object]]:
        if self.dies is not None:
            self.dies["Alive"] = False
        done = [call for call in calls if self.answers[call] is not NEVER]
        return done, [call for call in calls if call not in done]

    def get(self, calls: Any, timeout: float | None = None) -> Any:
        if isinstance(calls, list):
            return [self.get(call) for call in calls]
        answer = self.answers[calls]
        if answer is NEVER:
            raise ray.exceptions.GetTimeoutError("not in time")
        if isinstance(answer, Exception):
            raise answer
        return answer


class FakeRunner:
    """Every method is a call of its own."""

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: (id(self), name))


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> FakeRay:
    made = FakeRay()
    port = listener.getsockname()[1]
    for worker in (0, 1):
        labels = {SLICE_LABEL: "s0", WORKER_LABEL: str(worker)}
        node = {"NodeID": f"node-{worker}", "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port, "Alive": True, "Labels": labels}
        made.table.append(node)
    monkeypatch.setattr(module, "ray", made)
    return made


@pytest.fixture
def gang(fake: FakeRay, tmp_path: Path) -> Gang:
    made = Gang(RunDirectory(tmp_path), ClusterConfig(name="mine", cloud="emulated", accelerator_type="v4-16"), "slice", None)
    group: Any = "node-0"
    assert made.find_hosts(group)
    runners = [FakeRunner(), FakeRunner()]
    made._runners = list(runners)
    fake.answers = {(id(runner), name): NEVER for runner in runners for name in ("free_ports", "next_events", "kill")}
    return made


def test_a_host_that_dies_while_runners_are_placed_is_not_waited_for(fake: FakeRay, gang: Gang) -> None:
    fake.dies = fake.table[1]
    with pytest.raises(GangLost, match="host s0/1 died before its runner answered"):
        gang.start(0, timeout=60.0)


def test_runners_that_do_not_answer_on_living_hosts_are_given_up_at_the_limit(gang: Gang) -> None:
    with pytest.raises(GangLost, match="not in time"):
        gang.start(0, timeout=0.05)


@pytest.mark.parametrize("up", [True, False])
def test_a_host_that_lost_its_runner_is_used_again_only_when_it_answers(
    fake: FakeRay, gang: Gang, listener: socket.socket, up: bool
) -> None:
    fake.answers[id(gang._runners[1]), "next_events"] = RayActorError()
    ((index, event),) = gang.poll(timeout=0.0)
    assert (index, event["event"]) == (1, "lost")
    if not up:
        listener.close()
    group: Any = "node-0"
    assert all(node["Alive"] for node in fake.table), "Ray has not noticed"
    assert gang.find_hosts(group) is up
    assert gang.incomplete == ([] if up else ["s0"])
