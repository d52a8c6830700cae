"""The long-running operations of the emulated cloud. Called under the cloud's lock only."""

import secrets
from typing import Any

from cluster.emulator.checks import not_found
from cluster.emulator.clock import Clock
from cluster.emulator.faults import ON_OPERATION, STRUCK, Effect, Faults, Struck
from cluster.emulator.model import Refusal
from cluster.emulator.store import Store

_KEPT = 1000
"""Finished operations are forgotten, the oldest first, when there are more than this."""


class Operations:
    """Every operation, in memory and in the store."""

    def __init__(self, store: Store, clock: Clock, faults: Faults) -> None:
        self._store, self._clock, self._faults = store, clock, faults
        self._struck = Struck(store, STRUCK)
        self._all: dict[str, Any] = {operation.name: operation for operation in store.operations()}

    def begin(self, parent: str, target: str, verb: str) -> Any:
        """A new operation on the resource `target`; `parent` is projects/P/locations/ZONE."""
        from google.cloud import tpu_v2
        from google.longrunning import operations_pb2

        now = self._clock.now()
        metadata = tpu_v2.OperationMetadata.pb()(target=target, verb=verb, api_version="v2")
        metadata.create_time.FromNanoseconds(int(now * 1e9))
        operation = operations_pb2.Operation(name=f"{parent}/operations/operation-{int(now * 1000)}-{secrets.token_hex(8)}")
        operation.metadata.Pack(metadata)
        method = f"{verb.capitalize()}{'Node' if '/nodes/' in target else 'QueuedResource'}"
        for fault in self._faults.strike(method, target, ON_OPERATION)[:1]:
            self._struck.add(operation.name, fault)
        self._all[operation.name] = operation
        self._store.put_operation(operation)
        self._forget_oldest()
        return operation

    def succeed(self, name: str, response: Any) -> None:
        """`response`: a raw protobuf message."""
        operation = self._all.get(name)
        if operation is not None and not operation.done:
            operation.response.Pack(response)
            self._end(operation)

    def fail(self, name: str, code: int, words: str) -> None:
        operation = self._all.get(name)
        if operation is not None and not operation.done:
            operation.error.code, operation.error.message = code, words
            self._end(operation)

    def get(self, name: str) -> Any:
        """Raises Refusal."""
        if name not in self._all:
            raise not_found(name)
        return self._all[name]

    def hangs(self, name: str) -> bool:
        """Whether a fault keeps it from ever ending."""
        return self._struck.hangs(name)

    def stuck(self, name: str) -> bool:
        """Whether nothing comes of it any more: it hangs, or has ended."""
        return self.hangs(name) or name not in self._all or bool(self._all[name].done)

    def doom(self, name: str) -> Refusal | None:
        """The error with which a fault lets it end."""
        fault = self._struck.get(name)
        return fault.refusal("", self._target(name)) if fault is not None and fault.effect is Effect.OPERATION_ERROR else None

    def known(self, name: str) -> bool:
        return name in self._all

    def list(self, parent: str) -> "list[Any]":
        return [operation for name, operation in sorted(self._all.items()) if name.startswith(f"{parent}/operations/")]

    def forget(self, name: str) -> None:
        """Raises Refusal."""
        self._store.remove_operation(self.get(name).name)
        self._struck.end(name)
        del self._all[name]

    def _target(self, name: str) -> str:
        from google.cloud import tpu_v2

        metadata = tpu_v2.OperationMetadata.pb()()
        self._all[name].metadata.Unpack(metadata)
        return str(metadata.target)

    def _forget_oldest(self) -> None:
        done = [name for name, operation in self._all.items() if operation.done]
        for name in done[: max(0, len(self._all) - _KEPT)]:
            self.forget(name)

    def _end(self, operation: Any) -> None:
        from google.cloud import tpu_v2

        metadata = tpu_v2.OperationMetadata.pb()()
        operation.metadata.Unpack(metadata)
        metadata.end_time.FromNanoseconds(int(self._clock.now() * 1e9))
        operation.metadata.Pack(metadata)
        operation.done = True
        self._struck.end(operation.name)
        self._store.put_operation(operation)
