"""The guest attributes of one emulated host: the few words that a VM may publish about itself, kept on its disk."""

import json
import threading
from pathlib import Path

from cluster.state import write_atomic


class GuestAttributes:
    """`namespace/key` -> value. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """`path`: the file that keeps them, so that they outlive the daemon."""
        self._path, self._lock = path, threading.Lock()

    def values(self) -> dict[str, str]:
        try:
            found: dict[str, str] = json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}
        return found

    def put(self, name: str, value: str) -> None:
        with self._lock:
            self._write({**self.values(), name: value})

    def remove(self, name: str) -> None:
        with self._lock:
            self._write({key: value for key, value in self.values().items() if key != name})

    def _write(self, values: dict[str, str]) -> None:
        write_atomic(self._path, json.dumps(values))
