"""A small HTTP service on loopback for one user of the machine: what REST and the admin endpoint have in common."""

import functools
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from cluster.emulator.peers import Peers


@dataclass(frozen=True)
class Request:
    """One HTTP request."""

    verb: str
    path: str
    query: str
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What is answered: JSON text. Status 0: nothing, the connection is closed."""

    status: int
    body: str


class HttpServer:
    """Serves `answer` on 127.0.0.1 until `stop`."""

    def __init__(self, answer: Callable[[Request], Answer], port: int = 0) -> None:
        """`port`: 0 for any free one. One that is taken is given up for a free one."""
        try:
            self._server = _Server(("127.0.0.1", port), _Handler)
        except OSError:
            self._server = _Server(("127.0.0.1", 0), _Handler)
        self.port: int = self._server.server_address[1]
        self._server.answer, self._server.peers = answer, Peers(self.port)
        serve = functools.partial(self._server.serve_forever, poll_interval=0.05)
        self._thread = threading.Thread(target=serve, daemon=True, name=f"http-{self.port}")
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client that keeps its connection open must not hold up the end
    answer: Callable[[Request], Answer]
    peers: Peers

    def server_bind(self) -> None:
        """Without the base class's look-up of the address's name, which may wait for a DNS server."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes; without this the second waits for the client's acknowledgement

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        if not self._trusted():
            words = "this emulated cloud belongs to another user of the machine"
            error = {"code": 403, "message": words, "status": "PERMISSION_DENIED"}
            self._send(Answer(403, json.dumps({"error": error})))
            return
        self._send(self.server.answer(Request(self.command, url.path, url.query, body)))

    do_POST = do_DELETE = do_PATCH = do_PUT = do_GET

    def _trusted(self) -> bool:
        """A web page in the user's own browser reaches this port as well: it sends an Origin, or a Host that is not this machine."""
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        local = host in ("127.0.0.1", "localhost") and "Origin" not in self.headers
        return local and self.server.peers.allowed(f"ipv4:{self.client_address[0]}:{self.client_address[1]}")

    def _send(self, answer: Answer) -> None:
        if answer.status == 0:
            self.close_connection = True
            return
        body = answer.body.encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/json; charset=UTF-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Not a line for every call."""
