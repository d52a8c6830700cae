"""Weights & Biases' own client, offline: what a run tells it is read back from its file."""

import importlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.config import WandbConfig
from launcher.training.metrics import MetricsWriter, StepRecord
from launcher.training.tracking import Tracker

pytestmark = pytest.mark.timeout(180)


class Heard:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def emit(self, event: str, **values: Any) -> None:
        self.events.append({"event": event, **values})


def history(file: Path) -> list[dict[str, Any]]:
    """The rows that the client would send."""
    internal: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    rows = []
    for content in log_records(file.read_bytes()):
        record = internal.Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
    return rows


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


def test_what_is_logged_is_what_the_run_directory_says(tmp_path: Path) -> None:
    heard = Heard()
    tracker = Tracker(WandbConfig("a-project", mode="offline"), "my.run-1", {"trainer": {"lr": 0.5}}, tmp_path, heard)
    with MetricsWriter(tmp_path, 0, tracker) as writer:
        writer.step(StepRecord(5, 2.5, 0.1, 1.0, 0.1, 100.0, None, 0.25))
        writer.evaluation(5, 1.5)
        writer.step(StepRecord(4, 2.75, 0.1, 1.0, 0.1, 100.0, None, 0.25))  # after a rollback
    assert heard.events == []
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert folder.name.endswith("my.run-1")
    rows = history(next(folder.glob("*.wandb")))
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [(5, 2.5), (4, 2.75)]
    assert [(row["step"], row["held_out/loss"]) for row in rows if "held_out/loss" in row] == [(5, 1.5)]
    assert all("train/mfu" not in row for row in rows)


def test_a_client_that_cannot_begin_leaves_the_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "too-short")
    heard = Heard()
    tracker = Tracker(WandbConfig("a-project"), "r", {}, tmp_path, heard)
    with MetricsWriter(tmp_path, 0, tracker) as writer:
        writer.evaluation(5, 1.5)
    (told,) = heard.events
    assert told["event"] == "wandb_failed"
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
