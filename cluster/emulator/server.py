"""The Cloud TPU v2 and Secret Manager v1 APIs over gRPC, as the unmodified clients speak them."""

from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from cluster.emulator.api import SERVICES, Api, Dropped, Method
from cluster.emulator.model import Refusal
from cluster.emulator.peers import Peers
from cluster.emulator.status import status_of

_WORKERS = 16
_CODES: dict[int, Any] = {code.value[0]: code for code in grpc.StatusCode}


class Server:
    """Serves an Api on 127.0.0.1 from the moment it is made until `stop`."""

    def __init__(self, api: Api, port: int = 0) -> None:
        """`port`: 0 for any free one. One that is taken is given up for a free one."""
        # Without so_reuseport=0 two servers would share a port and each would answer half of the calls.
        self._server = grpc.server(ThreadPoolExecutor(_WORKERS, thread_name_prefix="grpc"), options=[("grpc.so_reuseport", 0)])
        self.port = self._bind(port)
        peers = Peers(self.port)
        self._server.add_generic_rpc_handlers(tuple(_handlers(api, service, peers) for service in SERVICES))
        self._server.start()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self, grace: float = 1.0) -> None:
        """Stop serving; calls under way have `grace` seconds."""
        self._server.stop(grace).wait()

    def _bind(self, port: int) -> int:
        try:
            return int(self._server.add_insecure_port(f"127.0.0.1:{port}"))
        except RuntimeError:
            return int(self._server.add_insecure_port("127.0.0.1:0"))


class _Status(namedtuple("_Status", ("code", "details", "trailing_metadata")), grpc.Status):  # type: ignore[misc]  # grpc is untyped
    """What gRPC wants for a status with details."""


def _handlers(api: Api, service: str, peers: Peers) -> Any:
    """A generic handler for raw protobuf requests. A method that is left out answers UNIMPLEMENTED."""
    return grpc.method_handlers_generic_handler(
        service,
        {
            name: grpc.unary_unary_rpc_method_handler(
                _answering(api, method, peers), request_deserializer=method.request.FromString, response_serializer=_serialize
            )
            for name, method in api.methods.items()
            if method.service == service
        },
    )


def _serialize(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def _answering(api: Api, method: Method, peers: Peers) -> Callable[[Any, Any], Any]:
    def answer(call: Any, context: Any) -> Any:
        if not peers.allowed(context.peer()):
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "this emulated cloud belongs to another user of the machine")
        try:
            return api.call(method.name, call)
        except Dropped:
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")  # what a client sees of a broken connection; we cannot break it
        except Refusal as refusal:
            metadata = (("grpc-status-details-bin", status_of(refusal).SerializeToString()),)
            context.abort_with_status(_Status(_CODES[refusal.code], refusal.words, metadata))

    return answer
