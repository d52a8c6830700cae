"""Reads the file that Weights & Biases' client leaves offline; the package brings no reader."""

import importlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.integration.conftest import eventually


def history(file: Path) -> list[dict[str, Any]]:
    """The rows that the client would send, once its service has written the end of the run: `finish` may return before."""
    eventually(lambda: any(kind == "exit" for kind, _ in records(file)), "the end of the run in W&B's file", limit=60)
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for kind, record in records(file)
        if kind == "history"
    ]


def records(file: Path) -> Iterator[tuple[str, Any]]:
    """Kind and content."""
    internal: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    for content in log_records(file.read_bytes()):
        record = internal.Record()
        record.ParseFromString(content)
        yield record.WhichOneof("record_type"), record


def log_records(content: bytes) -> Iterator[bytes]:
    """LevelDB's log format, behind a header of 7 bytes: blocks of 32 KiB, each of pieces with checksum, length, kind (full, first, ...)."""
    place, pieces = 7, b""
    while place + 7 <= len(content):
        left = -place % 32768
        if 0 < left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        pieces += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield pieces
            pieces = b""
