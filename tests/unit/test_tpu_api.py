"""TpuApi against the emulated service in this process."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from google.api_core.exceptions import ServiceUnavailable
from google.cloud import tpu_v2
from google.cloud.tpu_v2 import TpuClient

from cluster.emulator.embedded import Embedded, embedded_emulator
from cluster.tpu.api import ALL_ZONES, NodeRequest, TpuApi, make_client
from cluster.tpu.catalog import lookup, resolve
from cluster.tpu.errors import AlreadyExistsError, InvalidRuntimeVersionError, NotFoundError, TransientError

ZONE = "us-central2-b"


@pytest.fixture
def emulator() -> Iterator[Embedded]:
    with embedded_emulator() as running:
        yield running


@pytest.fixture
def api(emulator: Embedded) -> Iterator[TpuApi]:
    made = TpuApi(emulator.endpoint, "my-project")
    yield made
    made.close()


class Stumbling:
    """A client whose calls of one method fail `times` times, before or after they have taken effect."""

    def __init__(self, client: TpuClient, method: str, times: int, *, after: bool) -> None:
        self._client, self._method, self._times, self._after = client, method, times, after
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        real: Callable[..., Any] = getattr(self._client, name)
        return self._stumble(real) if name == self._method else real

    def _stumble(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            self.calls += 1
            if self.calls > self._times:
                return real(*args, **more)
            if self._after:
                real(*args, **more)
            raise ServiceUnavailable("try later")  # type: ignore[no-untyped-call]  # Google leaves it without types

        return call


def request(name: str = "mine-0", kind: str = "v4-16", **more: Any) -> NodeRequest:
    return NodeRequest(name, lookup(kind), more.pop("runtime_version", lookup(kind).runtime_version), **more)


def test_create_get_list_delete_round_trip(api: TpuApi) -> None:
    name = api.create_node(ZONE, request(labels={"a": "b"}, metadata={"k": "v"}, spot=True))
    assert name is not None
    wait_done(api, name)
    node = api.get_node(ZONE, "mine-0")
    assert (node.state, node.zone, node.accelerator_type, node.topology, len(node.hosts)) == ("READY", ZONE, "v4-16", "2x2x2", 2)
    assert (node.labels, node.spot, node.health) == ({"a": "b"}, True, "HEALTHY")
    assert node.created > 1.7e9
    assert api.list_nodes(ZONE) == [node]
    wait_done(api, api.delete_node(ZONE, "mine-0"))
    assert api.list_nodes(ZONE) == []


def test_create_other_topology_is_asked_for_by_configuration(api: TpuApi) -> None:
    kind = resolve("v4-512", topology="4x4x16")
    api.create_node(ZONE, NodeRequest("mine-0", kind, kind.runtime_version))
    assert api.get_node(ZONE, "mine-0").topology == "4x4x16"


def test_list_longer_than_a_page_is_complete(api: TpuApi) -> None:
    names = [f"n-{index:03}" for index in range(501)]
    for name in names:
        api.create_node(ZONE, request(name, "v4-8"))
    assert [node.name for node in api.list_nodes(ZONE)] == names


def test_refusals_become_errors_that_name_the_resource(api: TpuApi) -> None:
    api.create_node(ZONE, request())
    with pytest.raises(AlreadyExistsError, match="mine-0 in us-central2-b"):
        api.create_node(ZONE, request())
    with pytest.raises(InvalidRuntimeVersionError, match="leave runtime_version out"):
        api.create_node(ZONE, request("mine-1", runtime_version="none"))
    with pytest.raises(NotFoundError, match="other in us-central2-b"):
        api.get_node(ZONE, "other")
    with pytest.raises(NotFoundError):
        api.delete_node(ZONE, "other")


def test_lost_answer_of_create_does_not_create_twice(emulator: Embedded) -> None:
    client = Stumbling(make_client(emulator.endpoint, "my-project"), "create_node", 1, after=True)
    api = TpuApi(None, "my-project", client=client, sleep=lambda _: None)  # type: ignore[arg-type]  # stands in for the client
    assert api.create_node(ZONE, request()) is None
    assert client.calls == 1
    api.close()


def test_create_that_did_not_happen_is_repeated(emulator: Embedded) -> None:
    client = Stumbling(make_client(emulator.endpoint, "my-project"), "create_node", 2, after=False)
    api = TpuApi(None, "my-project", client=client, sleep=lambda _: None)  # type: ignore[arg-type]  # stands in for the client
    assert api.create_node(ZONE, request()) is not None
    assert client.calls == 3
    api.close()


def test_service_that_stays_away_is_given_up_after_the_patience() -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    api = TpuApi("127.0.0.1:1", "my-project", clock=lambda: now, sleep=sleep, jitter=lambda: 1.0, patience=20.0)
    with pytest.raises(TransientError, match="the service stumbled"):
        api.get_node(ZONE, "mine-0")
    assert 10.0 < now <= 20.0
    api.close()


class Lister:
    """A client whose listings lack the zones of `unreachable`."""

    def __init__(self, unreachable: list[str]) -> None:
        self._unreachable = unreachable

    def list_nodes(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(pages=[tpu_v2.ListNodesResponse(unreachable=self._unreachable)])

    def list_queued_resources(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(pages=[tpu_v2.ListQueuedResourcesResponse(unreachable=self._unreachable)])


@pytest.mark.parametrize("method", ["list_nodes", "list_queued_resources"])
@pytest.mark.parametrize(
    ("unreachable", "needed", "raises"),
    [
        ([], None, False),
        (["projects/p/locations/us-east5-a"], None, True),
        (["projects/p/locations/us-east5-a"], ["us-east5-a"], True),
        (["us-east5-a"], ["us-east5-a"], True),
        (["projects/p/locations/us-east5-a"], ["us-east5-b"], False),
        (["something"], ["us-east5-b"], True),
    ],
)
def test_listing_that_lacks_a_needed_zone_raises(method: str, unreachable: list[str], needed: list[str] | None, raises: bool) -> None:
    api = TpuApi(None, "my-project", client=Lister(unreachable))  # type: ignore[arg-type]  # stands in for the client
    if not raises:
        assert getattr(api, method)(ALL_ZONES, needed) == []
        return
    with pytest.raises(TransientError, match="the listing lacks"):
        getattr(api, method)(ALL_ZONES, needed)


def wait_done(api: TpuApi, name: str) -> None:
    for _ in range(2000):
        operation = api.get_operation(name, resource="mine-0", zone=ZONE)
        if operation.done:
            assert operation.error is None
            return
    raise AssertionError(f"{name} does not end")
