"""Instances against the emulated service in this process."""

from collections.abc import Iterator
from typing import Any

import pytest

from cluster.cloud_errors import (
    AlreadyExistsError,
    ApiDisabledError,
    CloudError,
    DeadlineExceededError,
    InvalidRequestError,
    PermissionDeniedError,
    QuotaError,
    StockoutError,
    TransientError,
    classify,
)
from cluster.compute import COMPUTE_ENGINE, Instances
from cluster.emulator.embedded import Embedded, embedded_emulator
from cluster.emulator.faults import Effect, Fault

ZONE, OTHER = "us-central1-a", "us-east5-a"


@pytest.fixture
def emulator() -> Iterator[Embedded]:
    with embedded_emulator() as running:
        yield running


@pytest.fixture
def instances(emulator: Embedded) -> Iterator[Instances]:
    made = Instances(emulator.rest, "my-project", sleep=lambda _: None)
    yield made
    made.close()


def spec(name: str = "n", zone: str = ZONE, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "machineType": f"zones/{zone}/machineTypes/e2-standard-4",
        "disks": [{"boot": True, "initializeParams": {"sourceImage": "projects/debian-cloud/global/images/family/debian-12"}}],
        "networkInterfaces": [{"accessConfigs": [{"name": "External NAT"}]}],
        **more,
    }


def make(instances: Instances, name: str = "n", zone: str = ZONE, **more: Any) -> None:
    instances.wait_operation(zone, instances.insert(zone, spec(name, zone, **more)), timeout=30)


def test_insert_get_list_delete_round_trip(instances: Instances) -> None:
    make(instances, labels={"cluster": "mine"})
    make(instances, "elsewhere", OTHER, labels={"cluster": "mine", "kind": "head"}, networkInterfaces=[{}])
    make(instances, "other", labels={"cluster": "other"})
    found = instances.get(ZONE, "n")
    assert found is not None
    assert (found.name, found.zone, found.status, dict(found.labels)) == ("n", ZONE, "RUNNING", {"cluster": "mine"})
    assert found.ip == found.external_ip
    assert found.ip.startswith("127.")
    assert found.created > 1.7e9
    mine = instances.list({"cluster": "mine"})
    assert [(one.name, one.zone, bool(one.external_ip)) for one in mine] == [("n", ZONE, True), ("elsewhere", OTHER, False)]
    assert mine[0] == found
    assert [one.name for one in instances.list({"cluster": "mine", "kind": "head"})] == ["elsewhere"]
    assert len(instances.list({})) == 3
    assert instances.delete(ZONE, "n")
    while instances.get(ZONE, "n") is not None:
        pass
    assert not instances.delete(ZONE, "n")


def test_name_that_is_taken_is_told(instances: Instances) -> None:
    make(instances)
    with pytest.raises(AlreadyExistsError, match="n in us-central1-a: the name is taken"):
        instances.insert(ZONE, spec())


@pytest.mark.parametrize("effect", [Effect.DROP, Effect.DROP_ANSWER])
@pytest.mark.parametrize(
    "method", ["instances.insert", "instances.get", "instances.aggregatedList", "instances.delete", "zoneOperations.wait"]
)
def test_lost_call_or_answer_is_repeated_and_makes_one(instances: Instances, emulator: Embedded, effect: Effect, method: str) -> None:
    emulator.cloud.faults.add(Fault(effect, method, count=1))
    make(instances)
    assert instances.get(ZONE, "n") is not None
    assert len(instances.list({})) == 1
    assert instances.delete(ZONE, "n")


@pytest.mark.parametrize(
    ("preset", "kind", "advice"),
    [
        ("compute-stockout", StockoutError, "add zones to the configuration"),
        ("compute-quota", QuotaError, "service compute.googleapis.com"),
        ("compute-permission", PermissionDeniedError, r"roles/compute\.instanceAdmin\.v1"),
        ("compute-api-disabled", ApiDisabledError, "gcloud services enable compute.googleapis.com"),
    ],
)
def test_refusal_says_what_helps(instances: Instances, emulator: Embedded, preset: str, kind: type[CloudError], advice: str) -> None:
    emulator.cloud.faults.add(Fault.from_dict({"preset": preset}))
    with pytest.raises(kind, match=advice) as caught:
        make(instances)
    assert str(caught.value).startswith("n in us-central1-a: ")


def test_quota_tells_the_blocked_region(instances: Instances, emulator: Embedded) -> None:
    emulator.cloud.faults.add(Fault.from_dict({"preset": "compute-quota"}))
    with pytest.raises(QuotaError) as caught:
        make(instances)
    assert caught.value.blocked_place == "us-central1"


def test_wrong_spec_is_told_in_the_words_of_the_service(instances: Instances) -> None:
    with pytest.raises(InvalidRequestError, match=r"'resource\.machineType': 'e2'"):
        instances.insert(ZONE, spec(machineType="e2"))


def test_operation_that_does_not_end_is_given_up(emulator: Embedded) -> None:
    instances = Instances(emulator.rest, "my-project", sleep=lambda _: None)
    emulator.cloud.faults.add(Fault(Effect.HANG, "instances.insert"))
    with pytest.raises(DeadlineExceededError, match="has not ended after 0 s"):
        instances.wait_operation(ZONE, instances.insert(ZONE, spec()), timeout=0.3)
    instances.close()


def test_listing_without_a_zone_is_not_taken_for_complete(emulator: Embedded) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    instances = Instances(emulator.rest, "my-project", patience=5.0, clock=lambda: now, sleep=sleep)
    make(instances)
    emulator.cloud.set_reachable(ZONE, False)
    with pytest.raises(TransientError, match=ZONE):
        instances.list({})
    assert 0.0 < now <= 5.0
    instances.close()


@pytest.mark.parametrize(
    ("words", "reason", "kind"),
    [
        ("The zone 'projects/p/zones/z' does not have enough resources available to fulfill the request.", "", StockoutError),
        ("anything", "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS", StockoutError),
        ("Quota 'CPUS' exceeded.  Limit: 24.0 in region us-central1.", "", QuotaError),
        ("The resource 'projects/p/zones/z/instances/n' is not ready", "resourceNotReady", TransientError),
    ],
)
def test_known_words_and_codes_are_told_apart(words: str, reason: str, kind: type[CloudError]) -> None:
    assert type(classify(None, words, service=COMPUTE_ENGINE, resource="n", reasons=[reason])) is kind
