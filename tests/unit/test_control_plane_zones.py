"""Zones that are full, that stay silent, and that come back: what a cluster in several zones does about them, on a virtual clock."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.cloud import tpu_v2
from ray.autoscaler.tags import TAG_RAY_LAUNCH_REQUEST, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

from cluster.autoscaler import autoscaler_config, host_settings
from cluster.config import ClusterConfig
from cluster.emulator.faults import PRESETS, Effect, Fault
from cluster.emulator.profile import REALISTIC
from cluster.errors import ConfigError
from cluster.node_provider import SliceNodeProvider
from cluster.secret_place import SecretPlace
from cluster.tpu.errors import DeadlineExceededError, PermissionDeniedError, TPUError, TransientError
from cluster.tpu.lifecycle import Life
from cluster.vm.bundle import Bundle
from tests.inprocess import Channel, Failure, World, world

A, B = "us-central2-b", "us-east5-a"
CONFIG = ClusterConfig(
    name="mine", project="my-project", zones=[A, B], accelerator_type="v4-16", slices=1, valid_until="4h", zone_patience="10m", max_slices=4
)
PLAIN = dataclasses.replace(CONFIG, queued_resource=False)
WORKER = {TAG_RAY_NODE_KIND: "worker"}
MINUTE = 60.0


@pytest.fixture
def emulated() -> Iterator[World]:
    with world(REALISTIC) as made:
        yield made


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path))


def full(emulated: World, *zones: str) -> None:
    for zone in zones:
        emulated.cloud.set_capacity(zone, "v4-16", 0)


def fault(emulated: World, rule: Fault) -> None:
    emulated.cloud.faults.add(rule)


def never_twice(emulated: World) -> Channel:
    """A way to the API on which a creation fails the test while the slice is in another zone still."""
    channel = emulated.channel()

    def before(method: str, request: Any) -> None:
        if method == "CreateQueuedResource":
            assert request.queued_resource_id not in {name for _, name in {*emulated.nodes(), *emulated.queued()}}

    channel.before = before
    return channel


# ---- a queue in which nothing comes


def test_a_slice_that_waits_in_vain_is_asked_for_in_the_next_zone(emulated: World) -> None:
    full(emulated, A)
    begun, channel = emulated.clock.now(), never_twice(emulated)
    status = emulated.provider(dataclasses.replace(CONFIG, slices=3), channel).start(poll=5.0)
    assert {item.zone for item in status.slices if item.life is Life.READY} == {B}
    assert 10 * MINUTE < emulated.clock.now() - begun < 13 * MINUTE
    assert channel.calls["CreateQueuedResource"] == 6
    assert {zone for zone, _ in emulated.queued()} == {B}


def test_the_last_zone_keeps_waiting(emulated: World) -> None:
    full(emulated, A, B)
    emulated.clock.after(50 * MINUTE, lambda: emulated.cloud.set_capacity(B, "v4-16", None))
    begun, channel = emulated.clock.now(), never_twice(emulated)
    (item,) = emulated.provider(CONFIG, channel).start(poll=5.0).slices
    assert (item.zone, channel.calls["CreateQueuedResource"]) == (B, 2)
    assert 50 * MINUTE < emulated.clock.now() - begun < 53 * MINUTE


def test_a_single_zone_keeps_waiting(emulated: World) -> None:
    full(emulated, A)
    emulated.clock.after(60 * MINUTE, lambda: emulated.cloud.set_capacity(A, "v4-16", None))
    channel = never_twice(emulated)
    emulated.provider(dataclasses.replace(CONFIG, zones=[A]), channel).start(poll=5.0)
    assert channel.calls["CreateQueuedResource"] == 1


def test_when_the_next_zone_refuses_the_first_is_asked_again_and_kept(emulated: World) -> None:
    full(emulated, A)
    emulated.cloud.set_quota(B, "v4", 0)
    emulated.clock.after(55 * MINUTE, lambda: emulated.cloud.set_capacity(A, "v4-16", None))
    channel = never_twice(emulated)
    (item,) = emulated.provider(CONFIG, channel).start(poll=5.0).slices
    assert (item.zone, channel.calls["CreateQueuedResource"]) == (A, 3), "A, B which refuses, A until there is capacity"


def test_a_zone_that_does_not_answer_is_no_reason_to_leave_a_queue(emulated: World) -> None:
    full(emulated, A)
    provider = emulated.provider(CONFIG)
    provider.create_slice("mine-0")
    provider.sweep()
    emulated.cloud.set_reachable(B, False)
    emulated.clock.advance(30 * MINUTE)
    assert [(item.zone, item.life) for item in provider.sweep()] == [(A, Life.PENDING)]
    emulated.cloud.set_reachable(B, True)
    assert [(item.zone, item.life) for item in provider.sweep()] == [(A, Life.LOST)]


def test_a_slice_whose_deletion_is_refused_stays_and_is_not_asked_for_elsewhere(emulated: World) -> None:
    full(emulated, A)
    provider = emulated.provider(CONFIG)
    provider.create_slice("mine-0")
    emulated.clock.advance(11 * MINUTE)
    emulated.cloud.faults.add(dataclasses.replace(PRESETS["permission"], method="DeleteQueuedResource"))
    assert [item.life for item in provider.sweep()] == [Life.PENDING], "two would be there at once"


def test_zone_patience_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"zone_patience '5s': at least 60s"):
        dataclasses.replace(CONFIG, zone_patience="5s")
    with pytest.raises(ConfigError, match=r"zone_patience 'soon' is no length of time"):
        dataclasses.replace(CONFIG, zone_patience="soon")


def test_a_node_that_the_service_takes_back_for_want_of_capacity_is_asked_for_in_the_next_zone(emulated: World) -> None:
    full(emulated, A)
    (item,) = emulated.provider(PLAIN).start(poll=1.0).slices
    assert item.zone == B


def test_what_an_earlier_process_was_refused_does_not_end_a_new_start(emulated: World) -> None:
    alone = dataclasses.replace(CONFIG, zones=[A], valid_until="5m")
    full(emulated, A)
    emulated.provider(alone).create_slice("mine-0")
    emulated.clock.advance(10 * MINUTE)
    assert emulated.queued() == {(A, "mine-0"): "FAILED"}
    emulated.cloud.set_capacity(A, "v4-16", None)
    assert emulated.provider(alone).start(poll=5.0).ready


# ---- a zone that stays silent


def node_provider(emulated: World, config: ClusterConfig, channel: Channel | None = None) -> SliceNodeProvider:
    settings = host_settings(config, "127.0.0.9:1", SecretPlace(file="/token"))
    file = autoscaler_config(config, settings, Bundle("bundle-hash"), "0123456789ab")
    return SliceNodeProvider(file["provider"], config.name, emulated.provider(config, channel, patience=0.0))


def ask(provider: SliceNodeProvider, request: str, count: int = 1) -> None:
    provider.create_node({}, {TAG_RAY_USER_NODE_TYPE: "v4-16", TAG_RAY_NODE_KIND: "worker", TAG_RAY_LAUNCH_REQUEST: request}, count)


@pytest.mark.parametrize("config", [CONFIG, PLAIN], ids=["queued", "plain"])
def test_a_silent_zone_keeps_the_slices_it_was_last_seen_with(emulated: World, config: ClusterConfig) -> None:
    provider = node_provider(emulated, config)
    full(emulated, B)
    ask(provider, "in-a")
    emulated.clock.advance(2 * MINUTE)
    full(emulated, A)
    emulated.cloud.set_capacity(B, "v4-16", None)
    provider._slices.policy.refused("v4-16", A, TransientError("now B", resource="x", zone=A))
    ask(provider, "in-b")
    emulated.clock.advance(2 * MINUTE)
    before = provider.non_terminated_nodes(WORKER)
    assert {provider._known[name].zone for name in before} == {A, B}
    emulated.cloud.set_reachable(B, False)
    for _ in range(20):  # longer than any limit: what is not seen is not given up either
        emulated.clock.advance(10 * MINUTE)
        assert sorted(provider.non_terminated_nodes(WORKER)) == sorted(before)
        assert all(provider.is_running(name) for name in before)
    emulated.cloud.set_reachable(B, True)
    assert sorted(provider.non_terminated_nodes(WORKER)) == sorted(before)
    assert len(emulated.nodes()) == 2


@pytest.mark.parametrize("config", [CONFIG, PLAIN], ids=["queued", "plain"])
def test_a_new_process_that_has_never_seen_a_zone_raises_instead_of_being_short(emulated: World, config: ClusterConfig) -> None:
    ask(node_provider(emulated, config), "in-a")
    emulated.cloud.set_reachable(A, False)
    again = node_provider(emulated, config)
    with pytest.raises(TransientError, match=f"lacks {A}"):
        again.non_terminated_nodes(WORKER)
    emulated.cloud.set_reachable(A, True)
    assert len(again.non_terminated_nodes(WORKER)) == 1


def test_new_slices_are_not_asked_for_in_a_silent_zone(emulated: World) -> None:
    provider = node_provider(emulated, CONFIG)
    provider.non_terminated_nodes({})
    emulated.cloud.set_reachable(A, False)
    provider.non_terminated_nodes({})
    ask(provider, "one")
    assert [zone for zone, _ in emulated.queued()] == [B]


def test_a_slice_asked_for_in_a_zone_that_fell_silent_is_not_asked_for_elsewhere(emulated: World) -> None:
    channel = emulated.channel()

    def fall_silent(method: str, request: Any) -> None:
        if method == "CreateQueuedResource" and A in request.parent:
            emulated.cloud.set_reachable(A, False)
            raise Failure(14, "Socket closed")

    channel.after = fall_silent
    emulated.clock.after(20 * MINUTE, lambda: emulated.cloud.set_reachable(A, True))
    said: list[str] = []
    status = emulated.provider(CONFIG, channel).start(poll=10.0, progress=said.append)
    assert [(item.name, item.zone) for item in status.slices] == [("mine-0", A)]
    assert "mine-0: asked for in a zone that does not answer" in said
    assert {zone for zone, _ in emulated.queued()} == {A}


def test_a_start_goes_on_when_the_service_stumbles_for_longer_than_our_patience(emulated: World) -> None:
    emulated.clock.after(15.0, functools.partial(fault, emulated, Fault(Effect.DROP, "List*")))
    emulated.clock.after(10 * MINUTE, emulated.cloud.faults.clear)
    said: list[str] = []
    assert emulated.provider(CONFIG).start(poll=5.0, progress=said.append).ready
    assert any(line.startswith("looking again: ") for line in said)


@pytest.mark.parametrize("verb", ["start", "stop"])
def test_whoever_finds_no_service_says_so_at_once(emulated: World, verb: str) -> None:
    emulated.cloud.faults.add(PRESETS["unavailable"])
    begun = emulated.clock.now()
    with pytest.raises(TransientError):
        getattr(emulated.provider(CONFIG), verb)(poll=5.0)
    assert emulated.clock.now() - begun <= MINUTE


# ---- listings of several pages


def many_nodes(emulated: World, count: int = 501) -> None:
    """More than a page of the emulator holds."""
    body = tpu_v2.Node.pb()(accelerator_type="v4-8", runtime_version="tpu-ubuntu2204-base", labels={"podlaunch-cluster": "mine"})
    for index in range(count):
        zone = A if index else B  # all of B's stand on the last page
        emulated.cloud.create_node(f"projects/my-project/locations/{zone}", f"mine-{index}", body)


def test_a_second_page_that_fails_makes_the_listing_raise(emulated: World) -> None:
    many_nodes(emulated)
    channel = emulated.channel()
    provider = emulated.provider(PLAIN, channel, patience=0.0)
    assert len(provider.list_slices()) == 501

    def fail(method: str, request: Any) -> None:
        if method == "ListNodes" and request.page_token:
            raise Failure(14, "Socket closed")

    channel.before = fail
    with pytest.raises(TransientError):
        provider.list_slices()
    with pytest.raises(TransientError):
        provider.sweep()


def test_a_zone_that_falls_silent_between_two_pages_counts_as_silent_on_both(emulated: World) -> None:
    many_nodes(emulated)
    channel = emulated.channel()
    provider = emulated.provider(PLAIN, channel, patience=0.0)
    whole = {item.name for item in provider.sweep()}

    def fall_silent(method: str, request: Any) -> None:
        if method == "ListNodes" and request.page_token:
            emulated.cloud.set_reachable(A, False)

    channel.before = fall_silent
    with pytest.raises(TransientError, match=f"lacks {A}"):
        provider.list_slices()
    emulated.cloud.set_reachable(A, True)
    assert {item.name for item in provider.sweep()} == whole


@pytest.mark.parametrize("seconds", [1, 3, 12, 15, 40, 60, 70, 75, 80])
def test_what_changes_between_the_two_listings_is_not_taken_for_lost(emulated: World, seconds: int) -> None:
    channel = emulated.channel()
    provider = emulated.provider(CONFIG, channel)
    provider.create_slice("mine-0")
    emulated.clock.advance(5.0)
    channel.after = lambda method, request: emulated.clock.advance(seconds if method.startswith("List") else 0)
    for _ in range(3):
        assert Life.LOST not in [item.life for item in provider.sweep()]


# ---- a stop that meets resistance


def test_a_stop_deletes_what_it_can_reach_and_names_what_it_cannot(emulated: World) -> None:
    two = dataclasses.replace(PLAIN, slices=2)
    provider = emulated.provider(two)
    provider.create_slice("mine-0", zone=A)
    provider.create_slice("mine-1", zone=B)
    emulated.cloud.set_reachable(B, False)
    with pytest.raises(DeadlineExceededError, match=f"perhaps more in {B}, which does not answer"):
        provider.stop(poll=5.0)
    assert list(emulated.nodes()) == [(B, "mine-1")]
    emulated.clock.after(2 * MINUTE, lambda: emulated.cloud.set_reachable(B, True))
    assert emulated.provider(two).stop(poll=5.0) == 1
    assert emulated.nodes() == {}


def test_a_deletion_that_is_refused_does_not_keep_the_others_from_going(emulated: World) -> None:
    three = dataclasses.replace(PLAIN, slices=3)
    emulated.provider(three).start(poll=5.0)
    emulated.cloud.faults.add(dataclasses.replace(PRESETS["permission"], method="DeleteNode", resource="mine-0"))
    with pytest.raises(PermissionDeniedError, match="mine-0"):
        emulated.provider(three).stop(poll=5.0)
    emulated.clock.advance(MINUTE)
    assert list(emulated.nodes()) == [(A, "mine-0")]


@pytest.mark.parametrize("config", [CONFIG, PLAIN], ids=["queued", "plain"])
def test_a_deletion_that_never_ends_is_asked_for_again(emulated: World, config: ClusterConfig) -> None:
    emulated.provider(config).start(poll=5.0)
    emulated.cloud.faults.add(Fault(Effect.HANG, "Delete*", count=1))
    emulated.provider(config).stop(poll=5.0)
    assert (emulated.nodes(), emulated.queued()) == ({}, {})


def test_a_stop_goes_on_when_the_service_stumbles_for_longer_than_our_patience(emulated: World) -> None:
    emulated.provider(CONFIG).start(poll=5.0)
    emulated.clock.after(4.0, functools.partial(fault, emulated, Fault(Effect.DROP, "List*")))
    emulated.clock.after(5 * MINUTE, emulated.cloud.faults.clear)
    assert emulated.provider(CONFIG).stop(poll=5.0) == 1
    assert (emulated.nodes(), emulated.queued()) == ({}, {})


def test_ray_ends_several_slices_although_one_cannot_be_asked(emulated: World) -> None:
    provider = node_provider(emulated, PLAIN)
    ask(provider, "one", 3)
    emulated.clock.advance(2 * MINUTE)
    names = provider.non_terminated_nodes(WORKER)
    emulated.cloud.faults.add(dataclasses.replace(PRESETS["permission"], method="DeleteNode", resource=names[0]))
    with pytest.raises(TPUError, match=names[0]):
        provider.terminate_nodes(names)
    emulated.clock.advance(MINUTE)
    assert [name for _, name in emulated.nodes()] == names[:1]


def test_a_start_that_fails_takes_back_the_replacement_of_a_lost_slice_too(emulated: World) -> None:
    provider = emulated.provider(PLAIN)
    provider.start(poll=5.0)
    emulated.cloud.preempt("mine-0", notice=0)
    emulated.clock.advance(0.0)
    emulated.cloud.faults.add(Fault(Effect.HANG, "CreateNode"))
    with pytest.raises(DeadlineExceededError):
        emulated.provider(PLAIN).start(timeout=120.0, poll=5.0)
    emulated.clock.advance(MINUTE)
    assert emulated.nodes() == {}
