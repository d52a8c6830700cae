"""What a child tells its supervisor, and the manifest of a checkpoint. No JAX here."""

import json
import os
from pathlib import Path

import pytest

from launcher.training.manifest import MANIFEST, verify, write_manifest
from launcher.training.reporter import EVENT_FD_VARIABLE, PipeReporter, SilentReporter, StepThrottle, reporter_from_environment


def test_pipe_reporter_writes_one_json_line_an_event() -> None:
    read, write = os.pipe()
    reporter = PipeReporter(write, clock=lambda: 12.5)
    reporter.emit("phase", phase="data")
    reporter.emit("step", step=1, total_steps=2, loss=None)
    os.close(write)
    with os.fdopen(read) as lines:
        events = [json.loads(line) for line in lines]
    assert events == [
        {"event": "phase", "phase": "data", "time": 12.5},
        {"event": "step", "step": 1, "total_steps": 2, "loss": None, "time": 12.5},
    ]


def test_pipe_reporter_survives_a_reader_that_went_away() -> None:
    read, write = os.pipe()
    os.close(read)
    reporter = PipeReporter(write)
    reporter.emit("phase", phase="data")
    reporter.emit("phase", phase="training")
    os.close(write)


def test_reporter_is_silent_without_a_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EVENT_FD_VARIABLE, raising=False)
    assert isinstance(reporter_from_environment(), SilentReporter)


def test_throttle_lets_first_last_and_logged_steps_through() -> None:
    now = [0.0]
    throttle = StepThrottle(10, clock=lambda: now[0])
    assert throttle.passes(1, has_metrics=False)
    now[0] = 0.1
    assert not throttle.passes(2, has_metrics=False)
    assert throttle.passes(3, has_metrics=True)
    now[0] = 0.2
    assert throttle.passes(10, has_metrics=False)
    now[0] = 0.5
    assert throttle.passes(4, has_metrics=False)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "weights").write_bytes(b"0123456789")
    (tmp_path / "_METADATA").write_text("{}")
    write_manifest(tmp_path)
    return tmp_path


def test_manifest_agrees_with_untouched_files(checkpoint: Path) -> None:
    assert verify(checkpoint) is None


def test_manifest_finds_flipped_bytes(checkpoint: Path) -> None:
    (checkpoint / "d" / "weights").write_bytes(b"0123456780")
    assert verify(checkpoint) == "the checksum of d/weights does not agree"


def test_manifest_finds_truncation(checkpoint: Path) -> None:
    (checkpoint / "d" / "weights").write_bytes(b"012")
    assert verify(checkpoint) == "d/weights has 3 bytes instead of 10"


def test_manifest_finds_a_missing_file(checkpoint: Path) -> None:
    (checkpoint / "d" / "weights").unlink()
    assert verify(checkpoint) == "d/weights is missing"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', '{"files": {"a": 1}}'])
def test_a_damaged_manifest_is_a_reason_not_a_crash(checkpoint: Path, text: str) -> None:
    (checkpoint / MANIFEST).write_text(text)
    assert verify(checkpoint) == "its manifest is damaged"


def test_no_manifest_is_a_reason(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()
    assert verify(checkpoint) == "it has no manifest"
