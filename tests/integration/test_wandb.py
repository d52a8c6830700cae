"""Weights & Biases' own client, offline: what a run tells it is read back from its file."""

from pathlib import Path
from typing import Any

import pytest

from launcher.config import WandbConfig
from launcher.training.metrics import MetricsWriter, StepRecord
from launcher.training.tracking import Tracker
from tests.integration.wandb_file import history

pytestmark = pytest.mark.timeout(180)


class Heard:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def emit(self, event: str, **values: Any) -> None:
        self.events.append({"event": event, **values})


def test_what_is_logged_is_what_the_run_directory_says(tmp_path: Path) -> None:
    heard = Heard()
    tracker = Tracker(WandbConfig("a-project", mode="offline"), "my.run-1", {"trainer": {"lr": 0.5}}, tmp_path, heard)
    with MetricsWriter(tmp_path, 0, tracker) as writer:
        writer.step(StepRecord(5, 2.5, 0.1, 1.0, 0.1, 100.0, None, 0.25))
        writer.evaluation(5, 1.5, {"code": 1.25})
        writer.step(StepRecord(4, 2.75, 0.1, 1.0, 0.1, 100.0, None, 0.25))  # after a rollback
    assert heard.events == []
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert folder.name.endswith("my.run-1")
    rows = history(next(folder.glob("*.wandb")))
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [(5, 2.5), (4, 2.75)]
    assert [(row["step"], row["held_out/loss"]) for row in rows if "held_out/loss" in row] == [(5, 1.5)]
    assert [row["held_out_parts/code"] for row in rows if "held_out/loss" in row] == [1.25]
    assert all("train/mfu" not in row for row in rows)


def test_a_client_that_cannot_begin_leaves_the_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "too-short")
    heard = Heard()
    tracker = Tracker(WandbConfig("a-project"), "r", {}, tmp_path, heard)
    with MetricsWriter(tmp_path, 0, tracker) as writer:
        writer.evaluation(5, 1.5, {})
    (told,) = heard.events
    assert told["event"] == "wandb_failed"
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
