"""The emulated cloud's memory: SQLite, so that it outlives the daemon, however that ends.

Not safe for several threads by itself: the cloud calls it under its lock.
"""

import dataclasses
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.emulator.model import HostRecord, NodeRecord, QueuedRecord
from cluster.processes import ProcessRecord
from cluster.tpu.catalog import AcceleratorType

_SCHEMA = """
CREATE TABLE IF NOT EXISTS nodes (path TEXT PRIMARY KEY, message BLOB NOT NULL, behind TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS operations (name TEXT PRIMARY KEY, message BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS queued (path TEXT PRIMARY KEY, message BLOB NOT NULL, operation TEXT NOT NULL, entered REAL NOT NULL);
CREATE TABLE IF NOT EXISTS requests (id TEXT PRIMARY KEY, operation TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS settings (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class Store:
    """One database file; `None` keeps everything in memory."""

    def __init__(self, path: Path | None) -> None:
        self._db = sqlite3.connect(path if path is not None else ":memory:", check_same_thread=False, isolation_level=None)
        # A write is safe from the end of the process, which is what has to be survived; only the machine's could lose the last ones.
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)
        self._depth = 0

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def together(self) -> Iterator[None]:
        """All that is written in the block, or nothing of it, outlives a sudden end. Blocks may lie in blocks; the outermost counts."""
        self._depth += 1
        if self._depth == 1:
            self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                # Also after an exception: memory has what was done until then, and the two must agree.
                self._db.execute("COMMIT")

    def put_node(self, node: NodeRecord) -> None:
        behind = {
            "uid": node.uid,
            "operation": node.operation,
            "holds": node.holds,
            "notices": node.notices,
            "kind": dataclasses.asdict(node.kind),
            "hosts": [dataclasses.asdict(host) for host in node.hosts],
        }
        self._db.execute("REPLACE INTO nodes VALUES (?, ?, ?)", (node.path, node.message.SerializeToString(), json.dumps(behind)))

    def remove_node(self, path: str) -> None:
        self._db.execute("DELETE FROM nodes WHERE path = ?", (path,))

    def nodes(self) -> list[NodeRecord]:
        from google.cloud import tpu_v2

        kind = tpu_v2.Node.pb()
        rows = self._db.execute("SELECT message, behind FROM nodes")
        return [_node(kind.FromString(message), json.loads(behind)) for message, behind in rows]

    def put_queued(self, queued: QueuedRecord) -> None:
        values = (queued.path, queued.message.SerializeToString(), queued.operation, queued.entered)
        self._db.execute("REPLACE INTO queued VALUES (?, ?, ?, ?)", values)

    def remove_queued(self, path: str) -> None:
        self._db.execute("DELETE FROM queued WHERE path = ?", (path,))

    def queued(self) -> list[QueuedRecord]:
        """Oldest first."""
        from google.cloud import tpu_v2

        kind = tpu_v2.QueuedResource.pb()
        rows = self._db.execute("SELECT message, operation, entered FROM queued ORDER BY rowid")
        return [QueuedRecord(kind.FromString(message), operation, entered) for message, operation, entered in rows]

    def put_request(self, key: str, operation: str) -> None:
        self._db.execute("REPLACE INTO requests VALUES (?, ?)", (key, operation))

    def request(self, key: str) -> str | None:
        """The operation that an earlier call with the same request id has begun."""
        row = self._db.execute("SELECT operation FROM requests WHERE id = ?", (key,)).fetchone()
        return str(row[0]) if row is not None else None

    def put_operation(self, operation: Any) -> None:
        self._db.execute("REPLACE INTO operations VALUES (?, ?)", (operation.name, operation.SerializeToString()))

    def remove_operation(self, name: str) -> None:
        self._db.execute("DELETE FROM operations WHERE name = ?", (name,))

    def operations(self) -> list[Any]:
        """Raw google.longrunning.Operation, oldest first."""
        from google.longrunning import operations_pb2

        rows = self._db.execute("SELECT message FROM operations ORDER BY rowid")
        return [operations_pb2.Operation.FromString(message) for (message,) in rows]

    def get(self, key: str, default: str) -> str:
        row = self._db.execute("SELECT value FROM settings WHERE key = ?", (key,)).fetchone()
        return str(row[0]) if row is not None else default

    def set(self, key: str, value: str) -> None:
        self._db.execute("REPLACE INTO settings VALUES (?, ?)", (key, value))

    def unset(self, key: str) -> None:
        self._db.execute("DELETE FROM settings WHERE key = ?", (key,))


def _node(message: Any, behind: dict[str, Any]) -> NodeRecord:
    hosts = [
        HostRecord(**{**host, "process": ProcessRecord.from_dict(host["process"]) if host["process"] is not None else None})
        for host in behind["hosts"]
    ]
    holds = bool(behind.get("holds", True))  # a database from before knows no capacity
    return NodeRecord(
        message, behind["uid"], AcceleratorType(**behind["kind"]), hosts, behind["operation"], holds, behind.get("notices", {})
    )
