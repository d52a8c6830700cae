"""TPUProvider against the emulated service in this process."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.config import TPUConfig
from cluster.emulator.cloud import READY, Cloud
from cluster.emulator.embedded import Embedded, embedded_emulator
from cluster.emulator.model import Refusal
from cluster.errors import ConfigError
from cluster.tpu.api import NodeRequest, TpuApi
from cluster.tpu.catalog import lookup
from cluster.tpu.errors import AlreadyExistsError, DeadlineExceededError, InvalidRequestError, StockoutError
from cluster.tpu.lifecycle import Life
from cluster.tpu.provider import OWNER_LABEL, TPUProvider
from cluster.tpu.requests import node_request

NO_CAPACITY = 'There is no more capacity in the zone "{zone}"; you can try in another zone where Cloud TPU Nodes are offered'
CONFIG = TPUConfig(
    "mine", project="my-project", zones=["us-central2-b", "us-east5-a"], accelerator_type="v4-16", slices=2, queued_resource=False
)


class ScriptedCloud(Cloud):
    """A cloud with zones that are full (found out in the operation) or closed (told at the call), and one that never finishes."""

    full: frozenset[str] = frozenset()
    refusing: dict[str, Refusal]
    stuck = False

    def create_node(self, parent: str, node_id: str, body: Any) -> Any:
        zone = parent.rpartition("/")[2]
        if zone in getattr(self, "refusing", {}):
            raise self.refusing[zone]
        operation = super().create_node(parent, node_id, body)
        if zone in self.full:
            with self._lock:
                self._operations.fail(operation.name, 8, NO_CAPACITY.format(zone=zone))
        return operation

    def _bring_up(self, node: Any) -> None:
        if not self.stuck and node.zone not in self.full:
            super()._bring_up(node)


@pytest.fixture
def emulator() -> Iterator[Embedded]:
    with embedded_emulator(cloud_class=ScriptedCloud) as running:
        yield running


@pytest.fixture
def cloud(emulator: Embedded) -> ScriptedCloud:
    assert isinstance(emulator.cloud, ScriptedCloud)
    return emulator.cloud


@pytest.fixture
def api(emulator: Embedded) -> Iterator[TpuApi]:
    made = TpuApi(emulator.endpoint, "my-project")
    yield made
    made.close()


@pytest.fixture
def provider(api: TpuApi) -> TPUProvider:
    return TPUProvider(CONFIG, api)


def start(provider: TPUProvider, timeout: float = 20.0) -> Any:
    return provider.start(timeout=timeout, poll=0.01)


def test_start_makes_named_labelled_slices_and_stop_leaves_nothing(provider: TPUProvider, api: TpuApi) -> None:
    status = start(provider)
    assert status.ready
    assert [item.name for item in status.slices] == ["mine-0", "mine-1"]
    assert [(item.life, len(item.hosts), item.zone) for item in status.slices] == [(Life.READY, 2, "us-central2-b")] * 2
    assert status.usd_per_hour == pytest.approx(2 * 8 * 3.22)
    assert status.slices[0].age_seconds < 20.0
    labels = provider.list_slices()[0].labels
    assert labels.keys() == {"podlaunch-cluster", "podlaunch-version", "podlaunch-type"}
    assert (labels["podlaunch-cluster"], labels["podlaunch-type"]) == ("mine", "v4-16")
    assert provider.stop(poll=0.01) == 2
    assert api.list_nodes("us-central2-b") == []
    assert provider.stop(poll=0.01) == 0


def test_start_twice_keeps_what_is_there(provider: TPUProvider) -> None:
    first = start(provider)
    second = start(provider)
    assert [item.hosts for item in first.slices] == [item.hosts for item in second.slices]


def test_start_adopts_a_slice_that_another_call_began(provider: TPUProvider) -> None:
    provider.create_slice("mine-0")
    assert start(provider).ready
    assert len(provider.list_slices()) == 2


def test_start_name_taken_by_a_stranger_is_an_error_and_leaves_it_alone(provider: TPUProvider, api: TpuApi) -> None:
    api.create_node("us-central2-b", NodeRequest("mine-1", lookup("v4-8"), "tpu-ubuntu2204-base"))
    with pytest.raises(AlreadyExistsError, match="this cluster did not make"):
        start(provider)
    assert "mine-1" in [node.name for node in api.list_nodes("us-central2-b")]
    provider.stop(poll=0.01)
    assert [node.name for node in api.list_nodes("us-central2-b")] == ["mine-1"]


def test_start_with_another_type_than_what_is_there_is_an_error(provider: TPUProvider, api: TpuApi) -> None:
    start(provider)
    bigger = TPUProvider(dataclasses.replace(CONFIG, accelerator_type="v4-32"), api)
    with pytest.raises(AlreadyExistsError, match="it exists as v4-16, not v4-32"):
        start(bigger)
    assert len(provider.list_slices()) == 2


def test_start_replaces_a_preempted_slice(provider: TPUProvider, cloud: ScriptedCloud) -> None:
    start(provider)
    lost = cloud._nodes["projects/my-project/locations/us-central2-b/nodes/mine-0"]
    assert lost.message.state == READY
    lost.message.state = 11  # PREEMPTED
    assert provider.get_status().slices[0].life is Life.LOST
    assert provider.get_status().usd_per_hour == pytest.approx(8 * 3.22)
    assert start(provider).ready
    assert lost not in cloud._nodes.values()


@pytest.mark.parametrize("way", ["full", "refusing"])
def test_start_goes_on_to_the_next_zone_when_one_has_no_capacity(provider: TPUProvider, cloud: ScriptedCloud, way: str) -> None:
    zone = "us-central2-b"
    if way == "full":
        cloud.full = frozenset({zone})
    else:
        cloud.refusing = {zone: Refusal(3, f"the accelerator v4-16 was not found in zone {zone}")}
    status = start(provider)
    assert {item.zone for item in status.slices} == {"us-east5-a"}


def test_start_without_capacity_anywhere_says_so_and_leaves_nothing(provider: TPUProvider, cloud: ScriptedCloud) -> None:
    cloud.full = frozenset(CONFIG.zones)
    with pytest.raises(StockoutError, match=r"mine-. in us-.*: no capacity.*stockout in us-east5-a; add zones"):
        start(provider)
    provider.stop(poll=0.01)
    assert provider.list_slices() == []


def test_start_refused_for_good_does_not_try_other_zones(provider: TPUProvider, cloud: ScriptedCloud) -> None:
    cloud.refusing = {"us-central2-b": Refusal(3, 'Cloud TPU received an invalid argument. The "tags" value "x" was not found.')}
    with pytest.raises(InvalidRequestError, match="us-central2-b"):
        start(provider)
    assert provider.list_slices() == []


def test_start_that_takes_too_long_names_what_it_waited_for_and_deletes_it(provider: TPUProvider, cloud: ScriptedCloud) -> None:
    cloud.stuck = True
    with pytest.raises(DeadlineExceededError, match=r"mine-0 \(CREATING in us-central2-b\)"):
        start(provider, timeout=0.2)
    provider.stop(poll=0.01, timeout=10.0)
    assert provider.list_slices() == []


def test_list_slices_filters_by_label_and_owner(provider: TPUProvider, api: TpuApi) -> None:
    provider.create_slice("mine-a", labels={"role": "spare"})
    provider.create_slice("mine-b", zone="us-east5-a")
    api.create_node("us-east5-a", NodeRequest("other", lookup("v4-8"), "tpu-ubuntu2204-base", labels={OWNER_LABEL: "other"}))
    assert [node.name for node in provider.list_slices()] == ["mine-a", "mine-b"]
    assert [node.name for node in provider.list_slices({"role": "spare"})] == ["mine-a"]


def test_delete_slice_is_idempotent_and_finds_the_zone(provider: TPUProvider) -> None:
    provider.create_slice("mine-b", zone="us-east5-a")
    assert provider.delete_slice("mine-b")
    assert not provider.delete_slice("none")


def test_request_carries_the_configuration(api: TpuApi) -> None:
    config = dataclasses.replace(CONFIG, provisioning="reserved", reservation="r", labels={"team": "a"}, tags=["t"], runtime_version="rt")
    request = node_request(config, "mine-0", TPUProvider(config, api).labels({"x": "y"}), {"k": "v"})
    assert (request.reserved, request.spot, request.runtime_version, request.tags) == (True, False, "rt", ("t",))
    assert request.labels.items() >= {"team": "a", "x": "y", OWNER_LABEL: "mine"}.items()


def test_provider_without_project_or_zones_is_refused(api: TpuApi) -> None:
    with pytest.raises(ConfigError, match="PODLAUNCH_ZONES"):
        TPUProvider(dataclasses.replace(CONFIG, zones=[]), api)
    with pytest.raises(ConfigError, match="GOOGLE_CLOUD_PROJECT"):
        TPUProvider(dataclasses.replace(CONFIG, project=None), api)
