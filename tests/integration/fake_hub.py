"""A stand-in for the Hugging Face hub: what its own client asks for to read the files of a model, with the hub's answers.

One folder is served as one model. As with the hub, where there is no such model 401 is the answer without a token and 404 with one; a
gated model is listed for everybody and read with an accepted token only; large files are redirected to another address.
"""

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import unquote

LARGE = ".safetensors"


class Asked(NamedTuple):
    """One request."""

    path: str
    token: str | None
    sent: int
    """Bytes of a file."""


@dataclass
class FakeHub:
    """`accepted`: the tokens that may read the model, None where everybody may; `known`: other tokens of somebody."""

    folder: Path
    name: str
    accepted: frozenset[str] | None = None
    known: frozenset[str] = frozenset()
    asked: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def log_message(self, format: str, *args: object) -> None:
                """Nobody reads it."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def tokens(self) -> set[str | None]:
        """With which tokens models were asked for; of the hub itself, not of where it sends its clients."""
        return {asked.token for asked in self.asked if asked.path.startswith("/api/models/") or "/resolve/" in asked.path}

    @property
    def bytes_sent(self) -> int:
        return sum(asked.sent for asked in self.asked)

    def _answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path, header = unquote(request.path.partition("?")[0]), request.headers.get("Authorization")
        token = header.removeprefix("Bearer ") if header else None
        code, headers, content = self._reply(path, token, request.headers.get("Range"))
        self.asked.append(Asked(path, token, len(content) if "/resolve/" in path or path.startswith("/cdn/") else 0))
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if body:
            request.wfile.write(content)

    def _reply(self, path: str, token: str | None, wanted: str | None) -> tuple[int, Mapping[str, str], bytes]:
        if path.startswith("/cdn/"):
            return self._file(path.removeprefix("/cdn/"), wanted)
        if token is not None and token not in (self.accepted or frozenset()) | self.known:
            return _error(401, "Invalid credentials in Authorization header")
        place = path.removeprefix("/api/models").removeprefix("/")
        if place.split("/")[:2] != self.name.split("/"):
            return _error(401 if token is None else 404, "Repository not found", "RepoNotFound")
        rest = place.removeprefix(self.name).strip("/").split("/")
        if rest[0] in ("revision", "tree", "resolve") and rest[1] != "main":
            return _error(404, f"Invalid rev id: {rest[1]}", "RevisionNotFound")
        if rest[0] != "resolve":
            return _json(self._tree() if rest[0] == "tree" else {"id": self.name, "sha": "0" * 40, "private": False})
        if self.accepted is not None and token not in self.accepted:
            return _error(401 if token is None else 403, f"Access to model {self.name} is restricted", "GatedRepo")
        if rest[2].endswith(LARGE):
            return 302, {"Location": f"{self.address.replace('127.0.0.1', 'localhost')}/cdn/{rest[2]}"}, b""
        return self._file(rest[2], wanted)

    def _file(self, name: str, wanted: str | None) -> tuple[int, Mapping[str, str], bytes]:
        if not (self.folder / name).is_file():
            return _error(404, "Entry not found", "EntryNotFound")
        content = (self.folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if wanted is None:
            return 200, headers, content
        first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        return 206, {**headers, "Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(content)}"}, part

    def _tree(self) -> list[dict[str, object]]:
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        return [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40} for path in files]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _json(value: object) -> tuple[int, Mapping[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _error(code: int, message: str, kind: str | None = None) -> tuple[int, Mapping[str, str], bytes]:
    headers = {"Content-Type": "application/json", "X-Error-Message": message} | ({"X-Error-Code": kind} if kind else {})
    return code, headers, json.dumps({"error": message}).encode()
