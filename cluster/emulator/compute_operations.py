"""The zonal operations of Compute Engine, as its JSON has them. Called under the cloud's lock only."""

import secrets
from typing import Any

from cluster.emulator.checks import not_found_by_compute
from cluster.emulator.clock import Clock
from cluster.emulator.compute_bodies import timestamp, url
from cluster.emulator.compute_errors import as_operation_error
from cluster.emulator.faults import ON_OPERATION, STRUCK_COMPUTE, Effect, Faults, Struck
from cluster.emulator.model import Refusal
from cluster.emulator.store import Store

_KEPT = 1000
"""Finished operations are forgotten, the oldest first, when there are more than this."""


class ComputeOperations:
    """Every operation by its path projects/P/zones/Z/operations/O, in memory and in the store."""

    def __init__(self, store: Store, clock: Clock, faults: Faults) -> None:
        self._store, self._clock, self._faults = store, clock, faults
        self._struck = Struck(store, STRUCK_COMPUTE)
        self._all: dict[str, dict[str, Any]] = store.compute_operations()

    def begin(self, target: str, target_id: str, verb: str) -> str:
        """A new operation on the instance `target`; returns its path."""
        now = self._clock.now()
        zone = target.partition("/instances/")[0]
        name = f"operation-{int(now * 1000)}-{secrets.token_hex(6)}-{secrets.token_hex(4)}"
        path = f"{zone}/operations/{name}"
        self._all[path] = {
            "kind": "compute#operation",
            "id": str(secrets.randbits(62)),
            "name": name,
            "zone": url(zone),
            "operationType": verb,
            "targetLink": url(target),
            "targetId": target_id,
            "status": "RUNNING",
            "user": "emulated@example.com",
            "progress": 0,
            "insertTime": timestamp(now),
            "startTime": timestamp(now),
            "selfLink": url(path),
        }
        for fault in self._faults.strike(f"instances.{verb}", target, ON_OPERATION)[:1]:
            self._struck.add(path, fault)
        self._store.put_compute_operation(path, self._all[path])
        self._forget_oldest()
        return path

    def succeed(self, path: str) -> None:
        self._end(path, {})

    def fail(self, path: str, reason: Refusal) -> None:
        self._end(path, as_operation_error(reason))

    def get(self, path: str) -> dict[str, Any]:
        """As JSON. Raises Refusal."""
        if path not in self._all:
            raise not_found_by_compute(path)
        return dict(self._all[path])

    def done(self, path: str) -> bool:
        """Raises Refusal."""
        return bool(self.get(path)["status"] == "DONE")

    def hangs(self, path: str) -> bool:
        """Whether a fault keeps it from ever ending."""
        return self._struck.hangs(path)

    def doom(self, path: str) -> Refusal | None:
        """The error with which a fault lets it end."""
        fault = self._struck.get(path)
        if fault is None or fault.effect is not Effect.OPERATION_ERROR:
            return None
        return fault.refusal("", self._all[path]["targetLink"].removeprefix(url("")))

    def known(self, path: str) -> bool:
        return path in self._all

    def _end(self, path: str, error: dict[str, Any]) -> None:
        found = self._all.get(path)
        if found is None or found["status"] == "DONE":
            return
        found.update({"status": "DONE", "progress": 100, "endTime": timestamp(self._clock.now()), **error})
        self._struck.end(path)
        self._store.put_compute_operation(path, found)

    def _forget_oldest(self) -> None:
        done = [path for path, operation in self._all.items() if operation["status"] == "DONE"]
        for path in done[: max(0, len(self._all) - _KEPT)]:
            self._store.remove_compute_operation(path)
            del self._all[path]
