"""A cluster whose head is an HTTP server of the test's own; a module that wants it imports the two fixtures."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.clusters import Cluster
from cluster.config import ClusterConfig
from cluster.head_here import HereHead
from cluster.processes import ProcessRecord
from cluster.state import cluster_dir
from cluster.vm.bundle import Bundle
from cluster.vm.head_agent import HeadSettings

BUNDLE = Bundle("bundle")
CONFIG = ClusterConfig(name="c", accelerator_type="v4-16", cloud="emulated")


class Head:
    """Answers what `answers` holds for a path, else 404; 401 without the token."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.posted: list[dict[str, Any]] = []
        self.refusals: list[str] = []
        """What the next posts are refused with, one each."""
        head = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                head.answer(self, head.answers.get(self.path))

            def do_POST(self) -> None:
                head.posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                if head.refusals:
                    head.refuse(self, head.refusals.pop(0))
                else:
                    head.answer(self, head.answers.get(f"POST {self.path}"))

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @staticmethod
    def refuse(handler: BaseHTTPRequestHandler, words: str) -> None:
        handler.send_response(500)
        handler.end_headers()
        handler.wfile.write(words.encode())

    @staticmethod
    def answer(handler: BaseHTTPRequestHandler, value: Any) -> None:
        known = handler.headers.get("Authorization") == "Bearer the-token"
        handler.send_response(401 if not known else 404 if value is None else 200)
        handler.end_headers()
        handler.wfile.write(json.dumps(value).encode())


@pytest.fixture
def head() -> Iterator[Head]:
    made = Head()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def cluster(head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Its agent is this very process, so it is alive."""
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path / "state"))
    folder = cluster_dir("c")
    (folder / "token").write_text("the-token\n")
    ip, port = "127.0.0.1", head.server.server_port
    settings = HeadSettings("c", "c-head", ip, ip, 1, port, 2, 3, str(folder / "token"), "", str(tmp_path))
    (folder / "process.json").write_text(json.dumps(vars(ProcessRecord(os.getpid(), psutil.Process().create_time(), "m"))))
    return Cluster(CONFIG, HereHead(CONFIG, BUNDLE, folder, settings), BUNDLE, 0.0)
