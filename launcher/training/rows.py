"""A .jsonl file that grows by whole lines; launcher/runs.py reads it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Rows:
    """Appends to `path`, one line a row, each written at once. One writer only."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":  # the writer before was killed inside a line: keep it from swallowing ours
                self._file.write(b"\n")

    def write(self, row: Mapping[str, Any]) -> None:
        """Raises ValueError for a number that is not finite: JSON has none. OSError when it cannot be written, which may leave a part."""
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        while line:
            line = line[self._file.write(line) :]  # a disk that is nearly full takes the beginning, and refuses the rest

    def close(self) -> None:
        self._file.close()
