"""Faults as rules: which calls go wrong, how, and how often.

Rules are kept in the store like nodes and limits, with how often each has struck and where its chances stand: a daemon that ends and comes
back goes on where it was. Methods of Compute Engine are called as its documentation has them: `instances.insert`. Beside the methods of the
APIs there is `BootHost`, with the resource `<node or instance>/hosts/<worker>`: LATENCY lets that host boot late, HANG never. A list has
the resource of its parent, its second and later pages `<parent>/pages/<id that the page before it ended with>`.
"""

import dataclasses
import enum
import fnmatch
import json
import random
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from cluster.emulator.model import Refusal
from cluster.emulator.store import Store

BOOT_HOST = "BootHost"
FAULTS, STRUCK, STRUCK_COMPUTE = "faults", "struck operations", "struck compute operations"
"""Under what rules, and what they do to operations, are kept in the store."""


class Effect(enum.Enum):
    """What a rule does to what it matches."""

    ERROR = "error"
    """The call is refused with `code` and `words`."""
    OPERATION_ERROR = "operation-error"
    """The call is accepted; its operation fails later with `code` and `words`."""
    LATENCY = "latency"
    """The call is answered `seconds` later."""
    DROP = "drop"
    """The connection breaks before the call has any effect."""
    DROP_ANSWER = "drop-answer"
    """The connection breaks after the call has taken effect."""
    HANG = "hang"
    """The call is accepted; its operation never ends."""


ON_CALL = frozenset({Effect.ERROR, Effect.LATENCY, Effect.DROP, Effect.DROP_ANSWER})
ON_OPERATION = frozenset({Effect.OPERATION_ERROR, Effect.HANG})
ON_BOOT = frozenset({Effect.LATENCY, Effect.HANG})


@dataclass(frozen=True)
class Fault:
    """One rule. `method`, `service`, `zone` and `resource` are patterns as of file names; `resource` matches a whole path or its last
    part.
    """

    effect: Effect
    method: str = "*"
    service: str = "*"
    """tpu, secretmanager or compute, or a pattern."""
    zone: str = "*"
    resource: str = "*"
    code: int = 14
    """google.rpc.Code, for errors."""
    words: str = "The service is currently unavailable."
    """{zone}, {region}, {project}, {method}, {id} and {resource} are filled in."""
    seconds: float = 0.0
    count: int | None = None
    """How often it strikes; None: always."""
    probability: float = 1.0
    seed: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Fault":
        """From JSON; `preset` names one of PRESETS, which the other values change. Raises ValueError."""
        given = dict(values)
        preset = given.pop("preset", None)
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"there is no preset {preset!r}; known: {', '.join(sorted(PRESETS))}")
        known = {field.name for field in dataclasses.fields(cls)}
        if wrong := sorted(given.keys() - known):
            raise ValueError(f"a fault has no {', '.join(wrong)}; it has: {', '.join(sorted(known))}")
        if "effect" in given:
            given["effect"] = Effect(given["effect"])
        elif preset is None:
            raise ValueError("a fault needs an effect or a preset")
        return dataclasses.replace(PRESETS[preset], **given) if preset is not None else cls(**given)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "effect": self.effect.value}

    def refusal(self, method: str, target: str) -> Refusal:
        """Its error, worded for what it struck."""
        parts = [*target.split("/"), "", "", "", ""]
        values = {"zone": parts[3], "region": parts[3].rpartition("-")[0], "project": parts[1], "method": method}
        values |= {"id": target.rpartition("/")[2], "resource": target}
        words = self.words
        for name, value in values.items():
            words = words.replace(f"{{{name}}}", value)
        return Refusal(self.code, words)


@dataclass
class _Rule:
    """A rule and how far it has come."""

    fault: Fault
    left: int | None
    draws: int = 0
    """Chances that were drawn; the next one follows from this and the seed alone."""


class Faults:
    """The rules that hold now. Safe to use from several threads."""

    def __init__(self, store: Store | None = None, lock: AbstractContextManager[Any] | None = None) -> None:
        """`lock`: whoever uses `store` holds it."""
        self._store = store
        self._lock = lock if lock is not None else threading.Lock()
        kept = json.loads(store.get(FAULTS, "{}")) if store is not None else {}
        rules = kept.get("rules", {})
        self._rules = {int(key): _Rule(Fault.from_dict(rule["fault"]), rule["left"], rule["draws"]) for key, rule in rules.items()}
        self._last: int = kept.get("last", 0)

    def add(self, fault: Fault) -> int:
        """The rule's number, by which it is removed again."""
        with self._lock:
            self._last += 1
            self._rules[self._last] = _Rule(fault, fault.count)
            self._keep()
            return self._last

    def remove(self, number: int) -> bool:
        with self._lock:
            found = self._rules.pop(number, None) is not None
            self._keep()
            return found

    def clear(self) -> None:
        with self._lock:
            self._rules.clear()
            self._keep()

    def rules(self) -> dict[int, Fault]:
        """By number; `count` is what is left of it."""
        with self._lock:
            return {number: dataclasses.replace(rule.fault, count=rule.left) for number, rule in self._rules.items()}

    def strike(self, method: str, target: str, effects: frozenset[Effect]) -> list[Fault]:
        """The rules that strike this time, in the order they were added; each that strikes is counted."""
        with self._lock:
            concerned = [rule for rule in self._rules.values() if rule.fault.effect in effects and _matches(rule.fault, method, target)]
            before = [(rule.left, rule.draws) for rule in concerned]
            struck = [rule.fault for rule in concerned if _due(rule)]
            if before != [(rule.left, rule.draws) for rule in concerned]:
                self._keep()
            return struck

    def _keep(self) -> None:
        if self._store is not None:
            rules = {key: {"fault": rule.fault.to_dict(), "left": rule.left, "draws": rule.draws} for key, rule in self._rules.items()}
            self._store.set(FAULTS, json.dumps({"last": self._last, "rules": rules}))


def _due(rule: _Rule) -> bool:
    if rule.left == 0:
        return False
    if rule.fault.probability < 1.0:
        rule.draws += 1
        # A generator's own state is thousands of bytes; one made anew for every chance has none that a restart could lose.
        if random.Random(f"{rule.fault.seed} {rule.draws}").random() >= rule.fault.probability:
            return False
    rule.left = None if rule.left is None else rule.left - 1
    return True


class Struck:
    """Operations to which a fault does something later, kept in `store` under `key`. Called under the cloud's lock only."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key = store, key
        self._all = {name: Fault.from_dict(rule) for name, rule in json.loads(store.get(key, "{}")).items()}

    def get(self, name: str) -> Fault | None:
        return self._all.get(name)

    def add(self, name: str, fault: Fault) -> None:
        self._all[name] = fault
        self._keep()

    def end(self, name: str) -> None:
        """The operation is over or forgotten."""
        if self._all.pop(name, None) is not None:
            self._keep()

    def hangs(self, name: str) -> bool:
        """Whether a fault keeps it from ever ending."""
        return name in self._all and self._all[name].effect is Effect.HANG

    def _keep(self) -> None:
        self._store.set(self._key, json.dumps({name: fault.to_dict() for name, fault in self._all.items()}))


def _matches(rule: Fault, method: str, target: str) -> bool:
    parts = target.split("/")
    zone = parts[3] if len(parts) > 3 else ""
    resource = fnmatch.fnmatchcase(target, rule.resource) or fnmatch.fnmatchcase(parts[-1], rule.resource)
    where = fnmatch.fnmatchcase(service_of(method), rule.service) and fnmatch.fnmatchcase(zone, rule.zone)
    return resource and where and fnmatch.fnmatchcase(method, rule.method)


def service_of(method: str) -> str:
    """The service that a method belongs to. Hosts that boot (BootHost) are of the first."""
    if method.startswith(("instances.", "zoneOperations.")):
        return "compute"
    return "secretmanager" if "Secret" in method else "tpu"


def _call(code: int, words: str, method: str = "Create*", service: str = "tpu") -> Fault:
    return Fault(Effect.ERROR, method, service, code=code, words=words)


def _operation(code: int, words: str, method: str = "Create*", service: str = "tpu") -> Fault:
    return Fault(Effect.OPERATION_ERROR, method, service, code=code, words=words)


_DISABLED = (
    "{name} API has not been used in project {project} before or it is disabled. Enable it by visiting "
    "https://console.developers.google.com/apis/api/{api}/overview?project={project} then retry."
)
# In the words of Google's documentation ("Troubleshooting resource errors") and of public logs.
COMPUTE_PRESETS: dict[str, Fault] = {
    "compute-stockout": _operation(
        8,
        "The zone 'projects/{project}/zones/{zone}' does not have enough resources available to fulfill the request.  "
        "Try a different zone, or try again later.",
        "instances.insert",
        "compute",
    ),
    "compute-quota": _call(8, "Quota 'CPUS' exceeded.  Limit: 24.0 in region {region}.", "instances.insert", "compute"),
    "compute-permission": _call(7, "Required '{method}' permission for '{resource}'", "*", "compute"),
    "compute-api-disabled": _call(
        7, _DISABLED.replace("{name}", "Compute Engine").replace("{api}", "compute.googleapis.com"), "*", "compute"
    ),
}
SECRET_PRESETS: dict[str, Fault] = {
    "secrets-permission": _call(
        7, "Permission 'secretmanager.versions.access' denied for resource '{resource}' (or it may not exist).", "*", "secretmanager"
    ),
    "secrets-api-disabled": _call(
        7, _DISABLED.replace("{name}", "Secret Manager").replace("{api}", "secretmanager.googleapis.com"), "*", "secretmanager"
    ),
}
# The errors seen in the wild, in their words (API fact sheet, section 3).
TPU_PRESETS: dict[str, Fault] = {
    "stockout": _operation(
        8,
        'There is no more capacity in the zone "{zone}"; you can try in another zone where Cloud TPU Nodes are offered '
        "(see https://cloud.google.com/tpu/docs/regions) [EID: 0xe48c]",
    ),
    "reserved-stockout": _operation(
        8, "Insufficient reserved capacity. Contact customer support to increase your reservation. [EID: 0xe48d]"
    ),
    "internal": _operation(13, "an internal error has occurred"),
    "preempted-while-creating": _operation(
        3, "Cloud TPU received a bad request. update is not supported while in state PREEMPTED [EID: 0xe48e]"
    ),
    "quota": _call(8, "Quota limit 'TPUV6EPreemptiblePerProjectPerRegionForTPUAPI' has been exceeded. Limit: 0 in region {region}."),
    "quota-other-text": _call(8, "Quota 'TPUV4sPreemptiblePodPerProjectPerRegionForTPUAPI' exhausted. Limit 20800 in region {region}"),
    "rate": _call(8, "Maximum number of {method} requests per minute"),
    "not-in-zone": _call(
        3,
        "Cloud TPU received a bad request. The requested accelerator configuration for accelerator type could not be found in the zonal "
        'accelerator configurations for "{zone}".; the accelerator was not found in zone {zone} [EID: 0xe48f]',
    ),
    "not-in-zone-old": _call(3, 'CloudTpu received an invalid AcceleratorType, "v3-8" for zone "{zone}". Valid values are "v2-8, ".'),
    "bad-value": _call(3, 'Cloud TPU received an invalid argument. The "GuestAttributes" value "" was not found.'),
    "zone-denied": _call(7, "Permission denied on 'locations/{zone}' (or it may not exist).", "*"),
    "zone-denied-other": _call(7, "Location {zone} is not found or access is unauthorized.", "*"),
    "permission": _call(7, "Permission 'tpu.nodes.get' denied on '{resource}'", "*"),
    "api-disabled": _call(
        7,
        "Cloud TPU API has not been used in project {project} before or it is disabled. Enable it by visiting "
        "https://console.developers.google.com/apis/api/tpu.googleapis.com/overview?project={project} then retry.",
        "*",
    ),
    "free-trial": _call(7, "cannot create a TPU Node on a project linked to a free-trial billing account"),
    "exists": _call(6, "Resource '{resource}' already exists"),
    "old-tpu-node": _call(9, "Your request to provision TPU Node has been denied. Please migrate to TPU VM Architecture"),
    "unavailable": _call(14, "The service is currently unavailable.", "*", "*"),
}
PRESETS = {**TPU_PRESETS, **COMPUTE_PRESETS, **SECRET_PRESETS}
