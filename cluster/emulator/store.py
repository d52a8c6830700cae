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

from cluster.emulator.model import HostRecord, InstanceRecord, NodeRecord, QueuedRecord
from cluster.processes import ProcessRecord
from cluster.tpu.catalog import AcceleratorType

_SCHEMA = """
CREATE TABLE IF NOT EXISTS nodes (path TEXT PRIMARY KEY, message BLOB NOT NULL, behind TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS operations (name TEXT PRIMARY KEY, message BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS queued (path TEXT PRIMARY KEY, message BLOB NOT NULL, operation TEXT NOT NULL, entered REAL NOT NULL);
CREATE TABLE IF NOT EXISTS instances (path TEXT PRIMARY KEY, body TEXT NOT NULL, behind TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS compute_operations (path TEXT PRIMARY KEY, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS secrets (path TEXT PRIMARY KEY, message BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS secret_versions (
    path TEXT NOT NULL, number INTEGER NOT NULL, message BLOB NOT NULL, payload BLOB NOT NULL, PRIMARY KEY (path, number)
);
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
        self._db.execute("PRAGMA secure_delete=ON")  # a secret that is deleted or destroyed is not left in free pages
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

    def put_instance(self, instance: InstanceRecord) -> None:
        behind = {
            "uid": instance.uid,
            "operation": instance.operation,
            "goes": instance.goes,
            "hosts": [dataclasses.asdict(host) for host in instance.hosts],
        }
        self._db.execute("REPLACE INTO instances VALUES (?, ?, ?)", (instance.path, json.dumps(instance.body), json.dumps(behind)))

    def remove_instance(self, path: str) -> None:
        self._db.execute("DELETE FROM instances WHERE path = ?", (path,))

    def instances(self) -> list[InstanceRecord]:
        rows = self._db.execute("SELECT path, body, behind FROM instances")
        return [_instance(path, json.loads(body), json.loads(behind)) for path, body, behind in rows]

    def put_compute_operation(self, path: str, body: dict[str, Any]) -> None:
        self._db.execute("REPLACE INTO compute_operations VALUES (?, ?)", (path, json.dumps(body)))

    def remove_compute_operation(self, path: str) -> None:
        self._db.execute("DELETE FROM compute_operations WHERE path = ?", (path,))

    def compute_operations(self) -> dict[str, dict[str, Any]]:
        """By path, oldest first."""
        return {path: json.loads(body) for path, body in self._db.execute("SELECT path, body FROM compute_operations ORDER BY rowid")}

    def put_secret(self, secret: Any) -> None:
        self._db.execute("REPLACE INTO secrets VALUES (?, ?)", (secret.name, secret.SerializeToString()))

    def secret(self, path: str) -> Any | None:
        """Raw google.cloud.secretmanager.v1.Secret."""
        from google.cloud import secretmanager_v1

        row = self._db.execute("SELECT message FROM secrets WHERE path = ?", (path,)).fetchone()
        return secretmanager_v1.Secret.pb().FromString(row[0]) if row is not None else None

    def secrets(self) -> list[Any]:
        """Raw google.cloud.secretmanager.v1.Secret."""
        from google.cloud import secretmanager_v1

        kind = secretmanager_v1.Secret.pb()
        return [kind.FromString(message) for (message,) in self._db.execute("SELECT message FROM secrets")]

    def remove_secret(self, path: str) -> None:
        """With all of its versions."""
        self._db.execute("DELETE FROM secret_versions WHERE path = ?", (path,))
        self._db.execute("DELETE FROM secrets WHERE path = ?", (path,))

    def remove_secrets(self) -> None:
        """All of them."""
        self._db.execute("DELETE FROM secret_versions")
        self._db.execute("DELETE FROM secrets")

    def put_secret_version(self, path: str, number: int, version: Any, payload: bytes) -> None:
        """`path`: the secret's."""
        self._db.execute("REPLACE INTO secret_versions VALUES (?, ?, ?, ?)", (path, number, version.SerializeToString(), payload))

    def newest_version(self, path: str) -> int:
        """Its number; 0 when the secret has none."""
        row = self._db.execute("SELECT MAX(number) FROM secret_versions WHERE path = ?", (path,)).fetchone()
        return int(row[0] or 0)

    def secret_version(self, path: str, number: int) -> tuple[Any, bytes] | None:
        """Raw google.cloud.secretmanager.v1.SecretVersion and its payload."""
        from google.cloud import secretmanager_v1

        row = self._db.execute("SELECT message, payload FROM secret_versions WHERE path = ? AND number = ?", (path, number)).fetchone()
        return (secretmanager_v1.SecretVersion.pb().FromString(row[0]), bytes(row[1])) if row is not None else None

    def get(self, key: str, default: str) -> str:
        row = self._db.execute("SELECT value FROM settings WHERE key = ?", (key,)).fetchone()
        return str(row[0]) if row is not None else default

    def set(self, key: str, value: str) -> None:
        self._db.execute("REPLACE INTO settings VALUES (?, ?)", (key, value))

    def unset(self, key: str) -> None:
        self._db.execute("DELETE FROM settings WHERE key = ?", (key,))


def _node(message: Any, behind: dict[str, Any]) -> NodeRecord:
    holds = bool(behind.get("holds", True))  # a database from before knows no capacity
    kind = AcceleratorType(**behind["kind"])
    return NodeRecord(message, behind["uid"], kind, _hosts(behind), behind["operation"], holds, behind.get("notices", {}))


def _instance(path: str, body: dict[str, Any], behind: dict[str, Any]) -> InstanceRecord:
    return InstanceRecord(path, body, behind["uid"], _hosts(behind), behind["operation"], behind["goes"])


def _hosts(behind: dict[str, Any]) -> list[HostRecord]:
    return [
        HostRecord(**{**host, "process": ProcessRecord.from_dict(host["process"]) if host["process"] is not None else None})
        for host in behind["hosts"]
    ]
