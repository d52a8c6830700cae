"""The emulated Cloud TPU API without a network: Google's own client on a channel that calls the emulator on the caller's thread.

Together with VirtualClock nothing waits and nothing depends on how threads are scheduled, so whatever a seed does it does every time.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.cloud import tpu_v2
from google.cloud.tpu_v2.services.tpu.transports import TpuGrpcTransport

from cluster.config import TPUConfig
from cluster.emulator.api import Api, Dropped
from cluster.emulator.clock import ManualClock
from cluster.emulator.cloud import Cloud
from cluster.emulator.hosts import NoHosts
from cluster.emulator.model import Refusal
from cluster.emulator.profile import INSTANT, Profile
from cluster.emulator.status import status_of
from cluster.emulator.store import Store
from cluster.tpu.api import TpuApi
from cluster.tpu.provider import TPUProvider
from cluster.tpu.zones import TokenBucket, ZonePolicy

_CODES: dict[int, Any] = {code.value[0]: code for code in grpc.StatusCode}
Hook = Callable[[str, Any], None]
"""Called with a method's name and its raw request; what it raises comes out of the transport."""


class VirtualClock(ManualClock):
    """A clock on which to sleep is to move it on."""

    def sleep(self, seconds: float) -> None:
        self.advance(max(0.0, seconds))


class Failure(grpc.RpcError, grpc.Call):  # type: ignore[misc]  # grpc is untyped
    """A call that failed, as grpc's client shows it."""

    def __init__(self, code: int, words: str, trailer: tuple[tuple[str, bytes], ...] = ()) -> None:
        super().__init__(words)
        self._code, self._words, self._trailer = _CODES[code], words, trailer

    def code(self) -> Any:
        return self._code

    def details(self) -> str:
        return self._words

    def trailing_metadata(self) -> Any:
        return self._trailer

    def initial_metadata(self) -> Any:
        return ()

    def result(self) -> Any:
        raise self

    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> float | None:
        return None

    def cancel(self) -> bool:
        return False

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return False


class Channel(grpc.Channel):  # type: ignore[misc]  # grpc is untyped
    """Carries calls to an Api. `before` and `after` are called around what the service does, and every call is counted."""

    def __init__(self, api: Api, clock: ManualClock) -> None:
        self._api, self._clock = api, clock
        self.calls: Counter[str] = Counter()
        self.before: Hook = lambda method, request: None
        self.after: Hook = lambda method, request: None

    def unary_unary(self, method: str, request_serializer: Any = None, response_deserializer: Any = None, *_: Any, **__: Any) -> Any:
        return _Callable(self, method.rpartition("/")[2], request_serializer, response_deserializer)

    def call(self, name: str, data: bytes, timeout: float | None) -> bytes:
        request = self._api.methods[name].request.FromString(data)
        self.calls[name] += 1
        self.before(name, request)
        begun = self._clock.now()
        try:
            answer: bytes = self._api.call(name, request).SerializeToString()
        except Dropped:
            raise Failure(14, "Socket closed") from None
        except Refusal as refusal:
            trailer = (("grpc-status-details-bin", status_of(refusal).SerializeToString()),)
            raise Failure(refusal.code, refusal.words, trailer) from None
        if timeout is not None and self._clock.now() - begun > timeout:
            raise Failure(4, "Deadline Exceeded")  # what was asked for has happened nevertheless
        self.after(name, request)
        return answer

    def close(self) -> None:
        """Nothing to let go of."""

    def unary_stream(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    stream_unary = stream_stream = subscribe = unsubscribe = unary_stream


class _Callable(grpc.UnaryUnaryMultiCallable):  # type: ignore[misc]  # grpc is untyped
    def __init__(self, channel: Channel, name: str, serialize: Any, deserialize: Any) -> None:
        self._channel, self._name, self._serialize, self._deserialize = channel, name, serialize, deserialize

    def with_call(self, request: Any, timeout: float | None = None, **_: Any) -> Any:
        answer = self._deserialize(self._channel.call(self._name, self._serialize(request), timeout))
        return answer, _Done(answer)

    def __call__(self, request: Any, timeout: float | None = None, **more: Any) -> Any:
        return self.with_call(request, timeout, **more)[0]

    def future(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


class _Done(Failure):
    """A call that went well."""

    def __init__(self, answer: Any) -> None:
        super().__init__(0, "")
        self._answer = answer

    def result(self) -> Any:
        return self._answer


@dataclass(frozen=True)
class World:
    """An emulated cloud, its clock, and the way to it."""

    cloud: Cloud
    clock: VirtualClock
    api: Api

    def channel(self) -> Channel:
        return Channel(self.api, self.clock)

    def tpu_api(self, channel: Channel | None = None, *, patience: float = 60.0, new_id: Callable[[], str] | None = None) -> TpuApi:
        client = tpu_v2.TpuClient(transport=TpuGrpcTransport(channel=channel if channel is not None else self.channel()))
        more: dict[str, Any] = {} if new_id is None else {"new_id": new_id}
        return TpuApi(
            None, "my-project", patience=patience, clock=self.clock.now, sleep=self.clock.sleep, jitter=lambda: 0.5, client=client, **more
        )

    def provider(
        self,
        config: TPUConfig,
        channel: Channel | None = None,
        *,
        patience: float = 60.0,
        at_once: int = 1,
        bucket: TokenBucket | None = None,
    ) -> TPUProvider:
        """A process of ours that has just begun."""
        return TPUProvider(
            config,
            self.tpu_api(channel, patience=patience),
            clock=self.clock.now,
            sleep=self.clock.sleep,
            policy=ZonePolicy(self.clock.now, jitter=lambda: 0.5),
            bucket=bucket,
            owner="0123456789ab",
            at_once=at_once,
        )

    def nodes(self) -> dict[tuple[str, str], str]:
        """(zone, name) -> state of everything that the emulator holds."""
        found = ([*node["name"].split("/"), node["state"]] for node in self.cloud.describe())
        return {(parts[3], parts[5]): parts[6] for parts in found}

    def queued(self) -> dict[tuple[str, str], str]:
        """The same of queued resources."""
        states = tpu_v2.QueuedResourceState.State
        return {
            (path.split("/")[3], path.split("/")[5]): states(record.message.state.state).name
            for path, record in self.cloud.queued._all.items()
        }


@contextmanager
def world(profile: Profile = INSTANT) -> Iterator[World]:
    clock, store = VirtualClock(), Store(None)
    cloud = Cloud(store, NoHosts(), clock, state_dir=Path("/"), profile=profile)
    cloud.resume()
    try:
        yield World(cloud, clock, Api(cloud))
    finally:
        clock.close()
        store.close()
