"""What a child tells its supervisor. No JAX here."""

import json
import os

import pytest

from launcher.process_variables import EVENT_FD
from launcher.training.reporter import PipeReporter, SilentReporter, StepThrottle, reporter_from_environment


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
    monkeypatch.delenv(EVENT_FD, raising=False)
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
    now[0] = 1.2
    assert throttle.passes(4, has_metrics=False)
