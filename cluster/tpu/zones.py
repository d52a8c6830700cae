"""Where to ask for a slice next: what the zones have refused, how long that counts, and how fast we may ask.

Refusals are kept by kind of slice and by place (a zone, or a region where the service's words name one). Every rule is a line of a table.
"""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cluster.durations import short_duration
from cluster.tpu.errors import (
    REFUSALS,
    NotInZoneError,
    PreemptedError,
    QuotaError,
    RateLimitedError,
    ReservationError,
    StockoutError,
    TPUError,
)

CREATES_PER_MINUTE = 60.0
"""Below the request quota that a large project has seen (91 CreateNode a minute in the whole project), so that others have some left."""


WAITED_S = 3600.0
"""A zone in whose queue nothing came within the patience is asked last for so long: a round through all zones takes at least this."""


@dataclass(frozen=True)
class _Rule:
    """For how many seconds a place is left alone after one refusal, and how that grows with each further one; None: for good."""

    word: str
    first: float | None
    factor: float = 2.0
    longest: float = 900.0


# The first line whose class fits decides.
_RULES: tuple[tuple[type[TPUError], _Rule], ...] = (
    (NotInZoneError, _Rule("not available", None)),
    # A quota changes when somebody deletes slices or Google grants more: minutes to days.
    (QuotaError, _Rule("quota used up", 600.0, longest=3600.0)),
    (ReservationError, _Rule("reservation full", 120.0)),
    (StockoutError, _Rule("stockout", 30.0)),
    (RateLimitedError, _Rule("too many requests", 30.0, longest=120.0)),
    (PreemptedError, _Rule("preempted while it was made", 15.0)),
    (TPUError, _Rule("failed", 15.0, longest=300.0)),
)


@dataclass(frozen=True)
class _Block:
    rule: _Rule
    error: TPUError
    until: float | None
    """On the policy's clock; None: for good."""
    refusals: int


class ZonePolicy:
    """What zones have refused. Safe to use from several threads; never waits."""

    def __init__(self, clock: Callable[[], float], jitter: Callable[[], float] = random.random) -> None:
        """`clock`: seconds. `jitter`: 0 to 1; pauses are shortened by up to a fifth by it, so that clusters do not ask in step."""
        self._clock, self._jitter = clock, jitter
        self._lock = threading.Lock()
        self._blocks: dict[tuple[str, str], _Block] = {}
        self._waited: dict[tuple[str, str], float] = {}

    def refused(self, kind: str, zone: str, error: TPUError) -> None:
        """`zone` has refused a slice of `kind`, at once or later."""
        place = _place(zone, error)
        rule = next(rule for refusal, rule in _RULES if isinstance(error, refusal))
        with self._lock:
            before = self._blocks.get((kind, place))
            if before is not None and before.until is None:
                return
            now = self._clock()
            # Slices asked for together are refused together: that is one refusal, told several times.
            same = before is not None and before.rule is rule and before.until is not None and now < before.until
            count = before.refusals + (not same) if before is not None and before.rule is rule else 1
            if same and before is not None:
                return
            self._blocks[kind, place] = _Block(rule, error, self._until(rule, now, count), count)

    def served(self, kind: str, zone: str) -> None:
        """`zone` has made a slice of `kind`: earlier refusals count no more."""
        with self._lock:
            self._waited.pop((kind, zone), None)
            for place in (zone, _region(zone)):
                self._blocks.pop((kind, place), None)

    def waited(self, kind: str, zone: str) -> None:
        """Nothing came in the queue of `zone` for as long as we wait there while others are open. That is no refusal: it is asked last."""
        with self._lock:
            self._waited[kind, zone] = self._clock()

    def open(self, kind: str, zones: Sequence[str]) -> list[str]:
        """Those of `zones` that may be asked now, in their order, those that we have `waited` for in vain behind the others."""
        with self._lock:
            now = self._clock()
            found = [zone for zone in zones if not any(_holds(block, now) for block in self._of(kind, zone))]
            return sorted(found, key=lambda zone: self._waited_at(kind, zone, now) or 0.0)

    def better_than(self, kind: str, zone: str, zones: Sequence[str]) -> list[str]:
        """Those of `zones` that may be asked now instead of going on to wait in `zone`.

        Within WAITED_S we have neither waited there nor been refused: else every refusal would cost the place in the queue of `zone`.
        """
        with self._lock:
            now = self._clock()
            others = [other for other in zones if other != zone and self._waited_at(kind, other, now) is None]
            return [other for other in others if not any(_tells_against(block, now) for block in self._of(kind, other))]

    def last_refusal(self, kind: str, zones: Sequence[str]) -> TPUError | None:
        """Why none of `zones` may be asked now: the refusal that ends first, since that is the one to wait for."""
        with self._lock:
            now = self._clock()
            blocks = [block for zone in zones for block in self._of(kind, zone) if _holds(block, now)]
        return min(blocks, key=lambda block: (block.until is None, block.until or 0.0)).error if blocks else None

    def describe(self, kind: str, zones: Sequence[str]) -> list[str]:
        """A line for every refusal that still counts, such as `stockout in us-east5-b, next try in 40 s`."""
        with self._lock:
            now = self._clock()
            places = dict.fromkeys(place for zone in zones for place in (zone, _region(zone)))
            held = [(place, block) for place in places if (block := self._blocks.get((kind, place))) and _holds(block, now)]
            since = {zone: self._waited_at(kind, zone, now) for zone in zones}
        lines = [f"{block.rule.word} in {place}, {_next_try(block, now)}" for place, block in held]
        waited = [(zone, at + WAITED_S - now) for zone, at in since.items() if at is not None]
        return [*lines, *(f"waited in vain in {zone}, asked after the other zones for {short_duration(left)}" for zone, left in waited)]

    def _waited_at(self, kind: str, zone: str, now: float) -> float | None:
        at = self._waited.get((kind, zone))
        return at if at is not None and now - at < WAITED_S else None

    def _of(self, kind: str, zone: str) -> Iterator[_Block]:
        for place in (zone, _region(zone)):
            if (block := self._blocks.get((kind, place))) is not None:
                yield block

    def _until(self, rule: _Rule, now: float, refusals: int) -> float | None:
        if rule.first is None:
            return None
        # 2 ** 60 s is past every limit, and larger powers need not be computed.
        pause = min(rule.first * rule.factor ** min(refusals - 1, 60), rule.longest)
        return now + pause * (1.0 - 0.2 * self._jitter())


class TokenBucket:
    """At most `per_minute` takings a minute, up to `size` of them at once. Safe to use from several threads; never waits."""

    def __init__(self, clock: Callable[[], float], per_minute: float = CREATES_PER_MINUTE, size: float | None = None) -> None:
        """`clock`: seconds. `size`: None for a minute's worth."""
        self._clock, self._rate = clock, per_minute / 60.0
        self._size = per_minute if size is None else size
        self._lock = threading.Lock()
        self._tokens, self._at = self._size, clock()

    def take(self) -> bool:
        """Whether one may be taken now; if so it is."""
        with self._lock:
            self._refill()
            if self._tokens < 1.0:
                return False
            self._tokens -= 1.0
            return True

    def drain(self) -> None:
        """The service says that we are too fast: start again from nothing."""
        with self._lock:
            self._refill()
            self._tokens = 0.0

    def wait_s(self) -> float:
        """Seconds until one may be taken."""
        with self._lock:
            self._refill()
            return max(0.0, (1.0 - self._tokens) / self._rate)

    def _refill(self) -> None:
        now = self._clock()
        self._tokens = min(self._size, self._tokens + max(0.0, now - self._at) * self._rate)
        self._at = now


def _place(zone: str, error: TPUError) -> str:
    """What a refusal speaks of: the region or zone that its words name, else the zone that was asked."""
    named = error.blocked_place if isinstance(error, QuotaError) else None
    return named if named in (zone, _region(zone)) and named is not None else zone


def _region(zone: str) -> str:
    return zone.rpartition("-")[0]


def _holds(block: _Block, now: float) -> bool:
    return block.until is None or now < block.until


def _tells_against(block: _Block, now: float) -> bool:
    """Whether it is a reason not to leave another zone's queue."""
    return _holds(block, now) or (isinstance(block.error, REFUSALS) and block.until is not None and now < block.until + WAITED_S)


def _next_try(block: _Block, now: float) -> str:
    return "not tried again" if block.until is None else f"next try in {short_duration(block.until - now)}"
