"""Which zone is asked next, on a clock that only the tests move."""

import pytest

from cluster.tpu.errors import (
    NotInZoneError,
    PreemptedError,
    QuotaError,
    RateLimitedError,
    StockoutError,
    TPUError,
    TransientError,
    UnknownError,
)
from cluster.tpu.zones import WAITED_S, TokenBucket, ZonePolicy

KIND = "v6e-8-spot"
A, B, C = "us-east5-a", "us-east5-b", "europe-west4-a"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def policy(clock: Clock) -> ZonePolicy:
    return ZonePolicy(clock, jitter=lambda: 0.0)


def test_stockout_leaves_the_zone_alone_for_longer_each_time(policy: ZonePolicy, clock: Clock) -> None:
    pauses = []
    for _ in range(8):
        policy.refused(KIND, A, StockoutError("full", resource="x", zone=A))
        assert policy.open(KIND, [A, B]) == [B]
        begun = clock.now
        while policy.open(KIND, [A]) == []:
            clock.now += 1
        pauses.append(clock.now - begun)
    assert pauses == [30, 60, 120, 240, 480, 900, 900, 900]


def test_slices_refused_together_count_as_one_refusal(policy: ZonePolicy, clock: Clock) -> None:
    for _ in range(16):
        policy.refused(KIND, A, StockoutError("full", resource="x", zone=A))
    clock.now += 30
    assert policy.open(KIND, [A]) == [A]


def test_a_zone_that_serves_starts_from_the_beginning(policy: ZonePolicy, clock: Clock) -> None:
    for _ in range(3):
        policy.refused(KIND, A, StockoutError("full", resource="x", zone=A))
        clock.now += 1000
    policy.served(KIND, A)
    policy.refused(KIND, A, StockoutError("full", resource="x", zone=A))
    clock.now += 30
    assert policy.open(KIND, [A]) == [A]


@pytest.mark.parametrize(
    ("words", "blocked"),
    [
        ("Quota limit 'TPUV6E' has been exceeded. Limit: 0 in region us-east5.", [A, B]),
        ("Quota limit 'TPUV6E' has been exceeded. Limit: 0 in zone us-east5-a.", [A]),
        ("Quota exceeded", [A]),
        ("Quota limit 'TPUV6E' has been exceeded. Limit: 0 in region asia-east1.", [A]),
    ],
)
def test_quota_blocks_long_and_where_the_words_say(policy: ZonePolicy, clock: Clock, words: str, blocked: list[str]) -> None:
    policy.refused(KIND, A, QuotaError(words, resource="x", zone=A))
    clock.now += 599
    assert policy.open(KIND, [A, B, C]) == [zone for zone in (A, B, C) if zone not in blocked]
    clock.now += 1
    assert policy.open(KIND, [A, B, C]) == [A, B, C]


def test_not_in_this_zone_is_never_tried_again(policy: ZonePolicy, clock: Clock) -> None:
    policy.refused(KIND, A, NotInZoneError("not found in zone", resource="x", zone=A))
    policy.refused(KIND, A, StockoutError("full", resource="x", zone=A))
    clock.now += 1e9
    assert policy.open(KIND, [A, B]) == [B]
    assert policy.describe(KIND, [A]) == ["not available in us-east5-a, not tried again"]


def test_another_kind_of_slice_is_another_matter(policy: ZonePolicy) -> None:
    policy.refused(KIND, A, StockoutError("full", resource="x", zone=A))
    assert policy.open("v6e-8", [A]) == [A]


def test_describe_says_what_where_and_until_when(policy: ZonePolicy, clock: Clock) -> None:
    policy.refused(KIND, B, StockoutError("full", resource="x", zone=B))
    policy.refused(KIND, A, QuotaError("Limit: 0 in region us-east5", resource="x", zone=A))
    policy.refused(KIND, C, PreemptedError("gone", resource="x", zone=C))
    clock.now += 10
    assert policy.describe(KIND, [A, B, C]) == [
        "quota used up in us-east5, next try in 10 min",
        "stockout in us-east5-b, next try in 20 s",
        "preempted while it was made in europe-west4-a, next try in 5 s",
    ]
    clock.now += 1000
    assert policy.describe(KIND, [A, B, C]) == []


def test_last_refusal_is_the_one_that_ends_first(policy: ZonePolicy) -> None:
    assert policy.last_refusal(KIND, [A]) is None
    policy.refused(KIND, A, NotInZoneError("no", resource="x", zone=A))
    policy.refused(KIND, B, QuotaError("quota", resource="x", zone=B))
    policy.refused(KIND, C, StockoutError("full", resource="x", zone=C))
    assert isinstance(policy.last_refusal(KIND, [A, B, C]), StockoutError)
    assert isinstance(policy.last_refusal(KIND, [A]), NotInZoneError)


@pytest.mark.parametrize("error", [UnknownError, TransientError, RateLimitedError, TPUError])
def test_every_other_refusal_pauses_the_zone_and_ends(policy: ZonePolicy, clock: Clock, error: type[TPUError]) -> None:
    policy.refused(KIND, A, error("?", resource="x", zone=A))
    assert policy.open(KIND, [A]) == []
    clock.now += 60
    assert policy.open(KIND, [A]) == [A]


def test_jitter_shortens_a_pause_by_up_to_a_fifth(clock: Clock) -> None:
    policy = ZonePolicy(clock, jitter=lambda: 1.0)
    policy.refused(KIND, A, StockoutError("full", resource="x", zone=A))
    clock.now += 24
    assert policy.open(KIND, [A]) == [A]


def test_bucket_gives_a_burst_and_then_the_rate(clock: Clock) -> None:
    bucket = TokenBucket(clock, per_minute=60, size=5)
    assert [bucket.take() for _ in range(6)] == [True] * 5 + [False]
    assert bucket.wait_s() == pytest.approx(1.0)
    taken = 0
    for _ in range(600):
        clock.now += 0.1
        taken += bucket.take()
    assert taken in (59, 60)
    clock.now += 1e6
    bucket.drain()
    assert not bucket.take()


def test_a_zone_waited_in_for_nothing_is_asked_last_for_an_hour(policy: ZonePolicy, clock: Clock) -> None:
    policy.waited(KIND, A)
    assert policy.open(KIND, [A, B, C]) == [B, C, A]
    clock.now += 600
    policy.waited(KIND, B)
    assert policy.open(KIND, [A, B, C]) == [C, A, B]
    assert policy.describe(KIND, [A]) == [f"waited in vain in {A}, asked after the other zones for 50 min"]
    clock.now += WAITED_S - 600
    assert policy.open(KIND, [A, B, C]) == [A, C, B]
    policy.served(KIND, B)
    assert policy.open(KIND, [A, B, C]) == [A, B, C]


def test_a_queue_is_left_only_for_a_zone_that_has_not_refused_lately(policy: ZonePolicy, clock: Clock) -> None:
    assert policy.better_than(KIND, A, [A, B, C]) == [B, C]
    policy.waited(KIND, B)
    policy.refused(KIND, C, StockoutError("full", resource="x", zone=C))
    assert policy.better_than(KIND, A, [A, B, C]) == []
    clock.now += WAITED_S
    assert policy.better_than(KIND, A, [A, B, C]) == [B]
    clock.now += 30
    assert policy.better_than(KIND, A, [A, B, C]) == [B, C]
    policy.refused(KIND, B, TransientError("stumbled", resource="x", zone=B))
    assert policy.better_than(KIND, A, [A, B, C]) == [C]
    clock.now += 15
    assert policy.better_than(KIND, A, [A, B, C]) == [B, C], "a service that stumbles says nothing about the zone"
