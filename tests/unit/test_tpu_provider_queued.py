"""TPUProvider on queued resources of the emulated service, with time in the test's hands."""

import dataclasses
import importlib.metadata
from collections.abc import Iterator

import pytest

from cluster.config import TPUConfig
from cluster.emulator.clock import ManualClock
from cluster.emulator.embedded import Embedded, embedded_emulator
from cluster.emulator.profile import Profile
from cluster.tpu.api import QueuedRequest, TpuApi
from cluster.tpu.errors import AlreadyExistsError, DeadlineExceededError, NotInZoneError, QuotaError, RateLimitedError, StockoutError
from cluster.tpu.lifecycle import Life
from cluster.tpu.provider import TPUProvider
from cluster.tpu.requests import as_json, node_request, plan
from cluster.tpu.zones import TokenBucket

A, B = "us-central2-b", "us-east5-a"
CONFIG = TPUConfig("mine", project="my-project", zones=[A, B], accelerator_type="v4-16", slices=2, valid_until="10m")
SLOW = Profile(create=60.0, delete=30.0, accept=2.0, queue=10.0, suspend=20.0)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def emulator(clock: ManualClock) -> Iterator[Embedded]:
    with embedded_emulator(clock=clock, profile=SLOW) as running:
        yield running


@pytest.fixture
def api(emulator: Embedded) -> Iterator[TpuApi]:
    made = TpuApi(emulator.endpoint, "my-project", patience=0.0)
    yield made
    made.close()


@pytest.fixture
def provider(api: TpuApi, clock: ManualClock) -> TPUProvider:
    return make(CONFIG, api, clock)


def make(config: TPUConfig, api: TpuApi, clock: ManualClock) -> TPUProvider:
    return TPUProvider(config, api, clock=clock.now, sleep=clock.advance, owner="0123456789ab")


def nothing_left(api: TpuApi, clock: ManualClock) -> bool:
    clock.advance(100.0)
    return api.list_nodes("-") == [] and api.list_queued_resources("-") == []


def test_start_takes_as_long_as_the_slowest_slice_and_stop_leaves_nothing(api: TpuApi, clock: ManualClock) -> None:
    provider = make(dataclasses.replace(CONFIG, slices=16), api, clock)
    begun, said = clock.now(), list[str]()
    status = provider.start(progress=said.append)
    assert status.ready
    assert clock.now() - begun < 80.0
    assert {item.zone for item in status.slices} == {A}
    assert api.get_queued_resource(A, "mine-0").node_ids == ("mine-0",)
    assert "mine-0: READY in us-central2-b" in said
    labels = provider.list_slices()[0].labels
    version = importlib.metadata.version("podlaunch").replace(".", "-")
    expected = {"podlaunch-cluster": "mine", "podlaunch-owner": "0123456789ab", "podlaunch-type": "v4-16", "podlaunch-version": version}
    assert labels == expected, "no run: several use a slice one after the other"
    assert provider.stop() == 16
    assert nothing_left(api, clock)


def test_a_slice_waits_for_capacity_and_goes_on_when_there_is_some(provider: TPUProvider, emulator: Embedded, clock: ManualClock) -> None:
    emulator.cloud.set_capacity(A, "v4-16", 1)
    clock.after(300.0, lambda: emulator.cloud.set_capacity(A, "v4-16", None))
    said: list[str] = []
    assert provider.start(progress=said.append).ready
    assert any("WAITING_FOR_RESOURCES in us-central2-b" in line for line in said)


def test_a_wait_that_is_over_leads_to_the_next_zone(provider: TPUProvider, emulator: Embedded) -> None:
    emulator.cloud.set_capacity(A, "v4-16", 0)
    assert {item.zone for item in provider.start(timeout=3000.0).slices} == {B}
    assert all(item.zone == B for item in provider.list_slices()), "the FAILED ones are deleted: they eat quota"


def test_no_capacity_anywhere_says_so_and_leaves_nothing(
    provider: TPUProvider, emulator: Embedded, api: TpuApi, clock: ManualClock
) -> None:
    for zone in (A, B):
        emulator.cloud.set_capacity(zone, "v4-16", 0)
    with pytest.raises((StockoutError, DeadlineExceededError), match=r"stockout in us-east5-a|WAITING"):
        provider.start(timeout=1500.0)
    assert nothing_left(api, clock)


def test_quota_in_the_region_is_told_and_nothing_is_left(
    provider: TPUProvider, emulator: Embedded, api: TpuApi, clock: ManualClock
) -> None:
    emulator.cloud.set_quota("us-central2", "v4", 0)
    emulator.cloud.set_quota("us-east5", "v4", 0)
    with pytest.raises(QuotaError, match="quota used up in us-central2, next try in"):
        provider.start()
    assert nothing_left(api, clock)


def test_a_suspended_slice_is_replaced(provider: TPUProvider, emulator: Embedded, clock: ManualClock, api: TpuApi) -> None:
    provider.start()
    emulator.cloud.delete_node(f"projects/my-project/locations/{A}/nodes/mine-0")
    clock.advance(60.0)
    (lost,) = [item for item in provider.list_slices() if item.life is Life.LOST]
    assert lost.name == "mine-0"
    assert lost.state in ("SUSPENDED", "SUSPENDING")
    assert provider.start().ready


def test_an_unreachable_zone_makes_a_listing_raise(provider: TPUProvider, emulator: Embedded) -> None:
    provider.start()
    emulator.cloud.set_reachable(B, False)
    with pytest.raises(Exception, match="us-east5-a"):
        provider.list_slices()


def test_ours_is_adopted_and_a_strangers_is_not(provider: TPUProvider, api: TpuApi, clock: ManualClock) -> None:
    first = provider.create_slice("mine-0")
    assert not first.adopted
    assert provider.create_slice("mine-0").adopted
    node = node_request(CONFIG, "mine-1", {"podlaunch-cluster": "other"}, {})
    api.create_queued_resource(A, QueuedRequest(node, 600.0))
    with pytest.raises(AlreadyExistsError, match="this cluster did not make it"):
        provider.create_slice("mine-1")


def test_creations_stay_below_the_rate(api: TpuApi, clock: ManualClock) -> None:
    provider = TPUProvider(CONFIG, api, clock=clock.now, sleep=clock.advance, bucket=TokenBucket(clock.now, per_minute=60, size=3))
    results = provider.create_slices([f"mine-{index}" for index in range(5)])
    assert sum(isinstance(result, RateLimitedError) for result in results) == 2
    many = dataclasses.replace(CONFIG, slices=9)
    patient = TPUProvider(many, api, clock=clock.now, sleep=clock.advance, bucket=TokenBucket(clock.now, per_minute=60, size=3))
    assert patient.start().ready, "what was too early is asked for again"


def test_a_second_of_one_name_in_another_zone_is_deleted(provider: TPUProvider, api: TpuApi, clock: ManualClock) -> None:
    provider.start()
    provider.create_slice("mine-0", zone=B)
    standing = [item for item in provider.sweep() if item.life is not Life.LOST]
    assert [(item.name, item.zone) for item in standing] == [("mine-0", A), ("mine-1", A)]
    clock.advance(100.0)
    assert len(provider.list_slices()) == 2


def test_what_is_stuck_is_given_up(emulator: Embedded, api: TpuApi, clock: ManualClock) -> None:
    config = dataclasses.replace(CONFIG, slices=1)
    provider = make(config, api, clock)
    provider.start()
    node = emulator.cloud._nodes[f"projects/my-project/locations/{A}/nodes/mine-0"]
    node.message.state = 6  # REPAIRING
    assert provider.sweep()[0].life is Life.INTERRUPTED
    clock.advance(1801.0)
    assert provider.sweep()[0].life is Life.LOST
    assert nothing_left(api, clock)


def test_plan_shows_the_requests_without_secrets_and_sends_none(api: TpuApi, clock: ManualClock) -> None:
    config = dataclasses.replace(
        CONFIG,
        slices=1,
        provisioning="spot",
        startup_commands=["export HF_TOKEN=hf_abcdefghijkl", "curl -H 'X-API-KEY: 12345' x"],
    )
    (request,) = plan(config, ["mine-0"], owner="", metadata={"startup-script": "#!/bin/bash\nexec true\n"})
    assert request["path"] == f"/v2/projects/my-project/locations/{A}/queuedResources?queuedResourceId=mine-0"
    body = request["body"]
    assert body["spot"] == {}
    assert body["queueingPolicy"] == {"validUntilDuration": "600s"}
    script = body["tpu"]["nodeSpec"][0]["node"]["metadata"]["startup-script"]
    assert "HF_TOKEN=<redacted>" in script
    assert "abcdefghijkl" not in script
    assert script.endswith("exec true\n")
    assert api.list_queued_resources("-") == []


def test_reservation_is_named_in_full(api: TpuApi) -> None:
    config = dataclasses.replace(CONFIG, provisioning="reserved", reservation="r")
    body = as_json(config, A, node_request(config, "mine-0", {}, {}))["body"]
    assert body["reservationName"] == f"projects/my-project/locations/{A}/reservations/r"
    assert body["tpu"]["nodeSpec"][0]["node"]["schedulingConfig"] == {"reserved": True}


def test_a_zone_without_the_type_is_not_asked_again(provider: TPUProvider) -> None:
    provider.policy.refused(provider.kind, A, NotInZoneError("no", resource="x", zone=A))
    assert provider.create_slice("mine-0").zone == B
