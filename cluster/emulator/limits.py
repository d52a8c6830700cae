"""What a zone can give and what a project may take: capacity, quota, and zones that do not answer. Called under the cloud's lock only.

Without a rule everything is there. Rules are kept in the store, like the nodes: they are part of the cloud, not of a test.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

from cluster.emulator.model import Refusal
from cluster.emulator.store import Store
from cluster.tpu.catalog import AcceleratorType

RESOURCE_EXHAUSTED, UNAVAILABLE = 8, 14
EVERYTHING = "*"
# Quota ids as they were seen: generation, then what follows "Preemptible".
_QUOTA_NAMES = {
    "v2": ("V2s", "Pod"),
    "v3": ("V3s", "Pod"),
    "v4": ("V4s", "Pod"),
    "v5e": ("V5s", "Litepod"),
    "v5p": ("V5P", ""),
    "v6e": ("V6E", ""),
}


@dataclass(frozen=True)
class Claim:
    """One slice that is asked for or held."""

    zone: str
    kind: AcceleratorType
    spot: bool = False


class Limits:
    """Every rule, in memory and in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._capacity: dict[str, int] = json.loads(store.get("capacity", "{}"))
        self._quota: dict[str, int] = json.loads(store.get("quota", "{}"))
        self._unreachable: set[str] = set(json.loads(store.get("unreachable", "[]")))

    def set_capacity(self, zone: str, what: str, amount: int | None) -> None:
        """`what`: an accelerator type (`amount` counts slices), a generation or `*` (it counts chips). None: without limit again."""
        _put(self._capacity, f"{zone}/{what}", amount)
        self._store.set("capacity", json.dumps(self._capacity))

    def set_quota(self, place: str, generation: str, amount: int | None, *, spot: bool = False) -> None:
        """`place`: a zone or a region. `amount` in the unit of the generation's type names: TensorCores, or chips for v5e and v6e."""
        _put(self._quota, f"{place}/{generation}/{'spot' if spot else 'on-demand'}", amount)
        self._store.set("quota", json.dumps(self._quota))

    def set_reachable(self, zone: str, reachable: bool) -> None:
        (self._unreachable.discard if reachable else self._unreachable.add)(zone)
        self._store.set("unreachable", json.dumps(sorted(self._unreachable)))

    def unreachable(self) -> list[str]:
        return sorted(self._unreachable)

    def check_reachable(self, zone: str) -> None:
        """Raises Refusal. The words are a guess."""
        if zone in self._unreachable:
            raise Refusal(UNAVAILABLE, f"The service is currently unavailable in {zone}.")

    def fits(self, wanted: list[Claim], held: Callable[[], list[Claim]]) -> bool:
        """Whether there is capacity for all of `wanted` beside what is held, which is asked only where there is a rule."""
        everything = [*wanted, *held()] if self._capacity else []
        for key, limit in self._capacity.items():
            place, what = key.split("/")
            # A zone that holds more than its limit, which may have come later, is full only for whom the limit concerns.
            concerns = any(claim.zone == place and _amount(what, claim.kind) for claim in wanted)
            if concerns and sum(_amount(what, claim.kind) for claim in everything if claim.zone == place) > limit:
                return False
        return True

    def check_quota(self, wanted: list[Claim], held: Callable[[], list[Claim]]) -> None:
        """Raises Refusal, in the words that were seen. `held` is asked only where there is a rule."""
        for key, limit in self._quota.items():
            place, generation, tier = key.split("/")
            spot = tier == "spot"

            def counts(claim: Claim, place: str = place, generation: str = generation, spot: bool = spot) -> bool:
                return place in (claim.zone, _region(claim.zone)) and claim.kind.generation == generation and claim.spot == spot

            asked = [claim for claim in wanted if counts(claim)]
            if asked and sum(_units(claim.kind) for claim in [*asked, *filter(counts, held())]) > limit:
                raise _quota_refusal(place, generation, spot, limit)


def stockout(zone: str) -> Refusal:
    """The error of an operation in a zone without capacity."""
    return Refusal(
        RESOURCE_EXHAUSTED,
        f'There is no more capacity in the zone "{zone}"; you can try in another zone where Cloud TPU Nodes are offered '
        "(see https://cloud.google.com/tpu/docs/regions) [EID: 0xe48c]",
    )


def _quota_refusal(place: str, generation: str, spot: bool, limit: int) -> Refusal:
    from google.rpc import error_details_pb2

    name, kind = _QUOTA_NAMES[generation]
    level = "zone" if place.count("-") == 2 else "region"
    quota = f"TPU{name}{'Preemptible' if spot else ''}{kind}PerProjectPer{level.capitalize()}ForTPUAPI"
    violation = error_details_pb2.QuotaFailure.Violation(description=f"Quota '{quota}' exhausted. Limit {limit} in {level} {place}")
    words = f"Quota limit '{quota}' has been exceeded. Limit: {limit} in {level} {place}."
    return Refusal(RESOURCE_EXHAUSTED, words, (error_details_pb2.QuotaFailure(violations=[violation]),))


def _put(rules: dict[str, int], key: str, amount: int | None) -> None:
    if amount is None:
        rules.pop(key, None)
    else:
        rules[key] = amount


def _amount(what: str, kind: AcceleratorType) -> int:
    if what == kind.name:
        return 1
    return kind.chips if what in (kind.generation, EVERYTHING) else 0


def _units(kind: AcceleratorType) -> int:
    return int(kind.name.rpartition("-")[2])


def _region(zone: str) -> str:
    return zone.rpartition("-")[0]
