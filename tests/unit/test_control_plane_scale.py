"""What hundreds of slices cost: calls of the API, time on the virtual clock, and our own time. Printed with `pytest -s`."""

import dataclasses
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from cluster.config import TPUConfig
from cluster.emulator.profile import REALISTIC
from cluster.tpu.lifecycle import Life
from cluster.tpu.zones import CREATES_PER_MINUTE, TokenBucket
from tests.inprocess import World, world

CONFIG = TPUConfig("mine", project="my-project", zones=["us-central2-b", "us-east5-a", "europe-west4-a"], accelerator_type="v4-16")
PLAIN = dataclasses.replace(CONFIG, queued_resource=False)
PAGE = 500
"""Of the emulator, as of the service."""
POLL_S = 5.0


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def unhurried(emulated: World) -> TokenBucket:
    """Creations as fast as we can ask."""
    return TokenBucket(emulated.clock.now, size=10_000)


def start(config: TPUConfig, slices: int, *, limited: bool = False) -> tuple[Counter[str], float]:
    """The calls and the seconds on the virtual clock."""
    with world(REALISTIC) as emulated:
        channel = emulated.channel()
        bucket = None if limited else unhurried(emulated)
        provider = emulated.provider(dataclasses.replace(config, slices=slices), channel, at_once=16, bucket=bucket)
        begun = emulated.clock.now()
        assert provider.start(poll=POLL_S).ready
        assert len(emulated.nodes()) == slices
        return channel.calls, emulated.clock.now() - begun


@pytest.mark.parametrize("config", [CONFIG, PLAIN], ids=["queued", "plain"])
def test_calls_grow_with_slices_and_pages_and_time_does_not(config: TPUConfig) -> None:
    create = "CreateQueuedResource" if config.queued_resource else "CreateNode"
    _, alone = start(config, 1)
    for slices in (1, 16, 256):
        calls, seconds = start(config, slices)
        print(f"{slices} slices: {seconds:.0f} s, {calls.total()} calls: {dict(calls)}")
        assert seconds == alone, "as long as the slowest slice, not the sum"
        looks = seconds / POLL_S + 1
        assert calls[create] == slices
        assert calls["ListNodes"] == calls["ListQueuedResources"] <= looks * math.ceil(slices / PAGE)
        # Only the operation tells why a plain node is not made: looked at once, and again after 1, 3, 7, 15, 31 and 63 s.
        assert calls["GetOperation"] <= (0 if config.queued_resource else 7 * slices)
        assert set(calls) <= {create, "ListNodes", "ListQueuedResources", "GetOperation"}


def test_a_start_is_no_faster_than_the_rate_of_creations_allows_and_hardly_slower() -> None:
    _, alone = start(CONFIG, 1)
    calls, seconds = start(CONFIG, 256, limited=True)
    print(f"256 slices at {CREATES_PER_MINUTE:.0f} a minute: {seconds:.0f} s, {calls.total()} calls")
    paced = (256 - CREATES_PER_MINUTE) * 60.0 / CREATES_PER_MINUTE
    assert alone + paced - POLL_S <= seconds <= alone + paced + 2 * POLL_S
    assert calls["CreateQueuedResource"] == 256, "what is too early costs no call"


@pytest.mark.parametrize("config", [CONFIG, PLAIN], ids=["queued", "plain"])
def test_a_status_is_one_listing_of_all_zones_and_a_thousand_slices_are_classified_in_under_100_ms(config: TPUConfig) -> None:
    with world() as emulated:
        channel = emulated.channel()
        provider = emulated.provider(dataclasses.replace(config, slices=1000), channel, bucket=unhurried(emulated))
        for index, name in enumerate([f"mine-{index}" for index in range(1000)]):
            provider.create_slice(name, zone=config.zones[index % 3])
        emulated.clock.advance(0.0)
        channel.calls.clear()
        taken = []
        for _ in range(5):
            # This thread's own time, client and service together, so that a busy machine does not count.
            begun = time.thread_time()
            status = provider.get_status()
            taken.append(time.thread_time() - begun)
        assert len([item for item in status.slices if item.life is Life.READY]) == 1000
        assert channel.calls == {"ListNodes": 5 * 2, "ListQueuedResources": 5 * (2 if config.queued_resource else 1)}
        print(f"1000 slices: {min(taken) * 1000:.0f} ms at best, {max(taken) * 1000:.0f} ms at worst")
        assert min(taken) < 0.1
