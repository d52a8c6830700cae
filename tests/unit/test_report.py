"""A run's page, from a run directory with everything that can be in one."""

from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig
from launcher.config import LaunchConfig
from launcher.data.config import DataConfig
from launcher.models.config import ModelConfig
from launcher.report.page import render
from launcher.report.story import Curve, Sample, Span, Story, badput_first, read_story
from launcher.runs import FirstFailure, Recoveries, RunDirectory, RunState, RunStatus
from launcher.training.rows import Rows

EVIL = "<script>alert('x')</script>"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "a-run")
    cluster = ClusterConfig(name="c", accelerator_type="v4-16", cloud="emulated")
    made.create(LaunchConfig(cluster, ModelConfig("gemma3-nano"), DataConfig("python_stdlib")))
    return made


def finished(run: RunDirectory, **fields: Any) -> Story:
    """A run that failed once at step 4 and went on from step 2."""
    values: dict[str, Any] = {
        "step": 6,
        "total_steps": 6,
        "attempt": 1,
        "loss": 1.0,
        "held_out_before": 3.0,
        "held_out_after": 1.1,
        "hosts": 2,
    }
    values |= {"phases": {"training": 60.0, "recovering": 15.0, "compiling": 25.0}, "goodput": 0.6, "recoveries": Recoveries(oom=1)}
    values |= {"started_at": 1000.0, "updated_at": 1100.0, "ended_at": 1100.0, "cost_usd": 1.25}
    run.write_status(RunStatus("a-run", "c", RunState.SUCCEEDED, **{**values, **fields}))
    for time, event, more in (
        (1010.0, "state", {"state": "STARTING", "attempt": 0}),
        (1030.0, "state", {"state": "RUNNING", "attempt": 0}),
        (1040.0, "checkpoint", {"step": 2}),
        (1050.0, "failure", {"attempt": 0, "host": "s/1", "cause": "oom", "error": EVIL}),
        (1050.0, "state", {"state": "RECOVERING", "attempt": 1}),
        (1060.0, "state", {"state": "RUNNING", "attempt": 1}),
        (1100.0, "state", {"state": "SUCCEEDED", "attempt": 1}),
    ):
        run.append_event({"time": time, "event": event, **more})
    rows = Rows(run.path / "metrics.jsonl")
    for attempt, steps in ((0, range(1, 5)), (1, range(3, 7))):
        for step in steps:
            measured = {"loss": 9.0 - step - attempt, "tokens_per_second": 100.0, "step_time": 0.5, "mfu": None}
            rows.write({"step": step, "attempt": attempt, **measured})
    rows.write({"step": 6, "attempt": 1, "held_out_loss": 1.1})
    rows.close()
    samples = Rows(run.path / "samples.jsonl")
    samples.write({"when": "before", "prompt": "def f(", "text": EVIL})
    samples.write({"when": "after", "prompt": "def f(", "text": "x):"})
    samples.close()
    story = read_story(run)
    assert story is not None
    return story


def test_attempts_are_told_as_spans_without_gaps(run: RunDirectory) -> None:
    assert finished(run).spans == [
        Span(0, RunState.QUEUED, 0, 10),
        Span(0, RunState.STARTING, 10, 30),
        Span(0, RunState.RUNNING, 30, 50),
        Span(1, RunState.RECOVERING, 50, 60),
        Span(1, RunState.RUNNING, 60, 100),
    ]


def test_steps_that_were_done_again_count_once_and_stay_visible(run: RunDirectory) -> None:
    story = finished(run)
    assert story.curves["loss"] == Curve([1, 2, 3, 4, 5, 6], [8, 7, 5, 4, 3, 2])
    assert story.undone == Curve([3, 4], [6, 5])
    assert story.curves["held_out_loss"] == Curve([6], [1.1])
    assert story.curves["mfu"] == Curve()
    assert story.samples == [Sample("def f(", EVIL, "x):")]
    assert badput_first(story.status.phases) == [("recovering", 15.0), ("compiling", 25.0), ("training", 60.0)]


def test_the_page_says_it_all_and_runs_nothing_of_the_run(run: RunDirectory) -> None:
    page = render(finished(run, first_failure=FirstFailure("s/1", EVIL)))
    said = page[page.index("<body>") :]
    for words in ("Run a-run", "SUCCEEDED", "60.0%", "$1.25", "3.0000 before, 1.1000 after", "done again", "gemma3-nano", "&lt;script&gt;"):
        assert words in said, words
    assert EVIL not in page
    assert said.count('class="plotly-graph-div"') == 4


def test_a_run_that_has_just_begun_has_a_page_too(run: RunDirectory) -> None:
    assert read_story(run) is None
    run.write_status(RunStatus("a-run", "c", RunState.QUEUED, started_at=1000.0, updated_at=1001.0))
    story = read_story(run)
    assert story is not None
    assert "QUEUED" in render(story)
