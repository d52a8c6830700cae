"""`tpu train`: what it does to run directories."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster.config import ClusterConfig
from cluster.errors import ConfigError, PodlaunchError
from launcher.cli.main import app
from launcher.cli.train_logs import Wanted, following
from launcher.cli.train_status import WIDTH, sparkline
from launcher.config import LaunchConfig
from launcher.data.config import DataConfig
from launcher.log_times import LogTimes, times_of, written_before
from launcher.models.config import ModelConfig
from launcher.runs import Recoveries, RunDirectory, RunState, RunStatus, StopRequest


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """One that goes on, on a cluster that is gone."""
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path / "state"))
    directory = RunDirectory(tmp_path / "runs" / "mine")
    cluster = ClusterConfig(name="c", accelerator_type="v4-16", cloud="emulated")
    directory.create(LaunchConfig(cluster, ModelConfig("gemma3-nano"), DataConfig("python_stdlib")))
    directory.write_status(RunStatus("mine", "c", RunState.QUEUED))
    return directory


@pytest.mark.parametrize(("options", "asked"), [((), StopRequest.SAVE), (("--now",), StopRequest.NOW)])
def test_stop_asks_for_a_checkpoint_unless_told_otherwise(run: RunDirectory, options: tuple[str, ...], asked: StopRequest) -> None:
    result = CliRunner().invoke(app, ["train", "stop", "mine", "--root", str(run.path.parent), *options])
    assert result.exit_code == 0, result.output
    assert run.stop_requested() is asked


def test_a_finished_run_cannot_be_stopped(run: RunDirectory) -> None:
    run.write_status(RunStatus("mine", "c", RunState.STOPPED))
    result = CliRunner().invoke(app, ["train", "stop", "mine", "--root", str(run.path.parent)])
    assert isinstance(result.exception, PodlaunchError)
    assert run.stop_requested() is None


def tpu(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def root_of(run: RunDirectory) -> tuple[str, str]:
    return "--root", str(run.path.parent)


def write_metrics(run: RunDirectory, *rows: tuple[int, int, float]) -> None:
    """(attempt, step, loss)"""
    lines = [json.dumps({"step": step, "attempt": attempt, "time": 1.0, "loss": loss}) for attempt, step, loss in rows]
    run.files.append("metrics.jsonl", "".join(f"{line}\n" for line in lines).encode())


def test_one_run_is_shown_with_its_curve_its_failures_and_its_account(run: RunDirectory) -> None:
    running = RunStatus(
        "mine",
        "c",
        RunState.STARTING,
        attempt=1,
        phase="training",
        step=20,
        total_steps=40,
        loss=2.0,
        hosts=2,
        slices=["c-a"],
        recoveries=Recoveries(preempted=1),
        goodput=0.75,
        phases={"training": 30.0, "recovering": 10.0},
        updated_at=40.0,
    )
    run.write_status(running)
    write_metrics(run, (0, 10, 4.0), (0, 20, 3.5), (1, 20, 3.0), (1, 30, 2.0))
    failure = {"event": "failure", "attempt": 0, "step": 20, "host": "c-a worker 1", "cause": "preempted", "error": "taken back"}
    run.append_event(failure)
    shown = tpu("train", "status", "mine", *root_of(run))
    assert f"{'█' * 20}{'░' * 20} 20/40" in shown
    assert "loss        █▅▁ 4.0000 to 2.0000" in shown, "of step 20 the later value"
    assert "attempt 0 at step 20 on c-a worker 1 (preempted): taken back" in shown
    assert "2 on c-a" in shown
    assert f"{'█' * 30}{'░' * 10} 75.0%" in shown
    assert "75%" in tpu("train", "status", *root_of(run))
    (row,) = json.loads(tpu("train", "status", "--json", *root_of(run)))
    assert row == json.loads(tpu("train", "status", "mine", "--json", *root_of(run)))


def test_a_curve_has_a_gap_where_it_is_no_number_and_never_more_than_its_width() -> None:
    assert sparkline([1.0, float("nan"), 3.0]) == "▁ █"
    assert sparkline([2.0]) == "▁"
    assert sparkline([float("inf")]) == ""
    assert len(sparkline([float(value) for value in range(1000)])) == WIDTH


def test_two_runs_are_compared_by_settings_and_losses(run: RunDirectory) -> None:
    other = RunDirectory(run.path.parent / "other")
    config = run.config()
    other.create(dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, lr=1e-5)))
    for directory, shift in ((run, 0.0), (other, 0.5)):
        write_metrics(directory, *((0, step, 4.0 - step / 10 + shift) for step in range(1, 31)))
    shown = tpu("train", "compare", "mine", "other", *root_of(run))
    settings, *_ = shown.split("\n\n")
    assert [line.split() for line in settings.splitlines()] == [["SETTING", "mine", "other"], ["trainer.lr", "null", "1e-05"]]
    rows = [line.split() for line in shown.splitlines() if line.rstrip().endswith("+0.5000")]
    assert [row[0] for row in (rows[0], rows[-1])] == ["1", "30"]
    assert len(rows) == 10
    write_metrics(RunDirectory(run.path.parent / "other"), (1, 30, 0.0))
    assert "-1.0000" in tpu("train", "compare", "mine", "other", *root_of(run)), "of a step done again the later value"


def test_logs_are_followed_over_attempts_until_the_run_ends(run: RunDirectory) -> None:
    run.files.append(run.log_name(0, 0), b"one\ntwo\nthree\n")
    for state in (RunState.STARTING, RunState.RUNNING):
        run.write_status(RunStatus("mine", "c", state))
    lives = iter(["more", "next attempt", "end"])

    def sleep(_: float) -> None:
        match next(lives):
            case "more":
                run.files.append(run.log_name(0, 0), b"four\nhal")
            case "next attempt":
                run.files.append(run.log_name(1, 1), b"five\n")
            case "end":
                run.files.append(run.log_name(1, 1), b"six\n")
                run.write_status(RunStatus("mine", "c", RunState.SUCCEEDED))

    lines = list(following(run, Wanted(tail=2), sleep))
    assert lines == ["host-0  two", "host-0  three", "host-0  four", "attempt 1", "host-1  five", "host-1  six"]
    assert list(following(run, Wanted(host=1, attempt=1), sleep)) == ["host-1  five", "host-1  six"]


def test_logs_of_the_last_minutes_are_those_of_all_attempts(run: RunDirectory) -> None:
    run.files.append(run.log_name(0, 0), b"old\nwhen?\n")
    run.files.append("logs/0/host-0.times", f"{time.time() - 900:.3f} 4\n{time.time() - 300:.3f} 10\n".encode())
    run.files.append(run.log_name(1, 0), b"new\n")
    run.files.append("logs/1/host-0.times", f"{time.time() - 10:.3f} 4\n{time.time():.0f}".encode())
    assert tpu("train", "logs", "mine", "--since", "10m", *root_of(run)).splitlines() == ["host-0  when?", "attempt 1", "host-0  new"]
    assert tpu("train", "logs", "mine", "--since", "1m", *root_of(run)).splitlines() == ["host-0  new"]
    assert tpu("train", "logs", "mine", "--since", "1m", "--attempt", "0", *root_of(run)) == ""
    with pytest.raises(PodlaunchError, match="--since '10 minutes' is no length of time"):
        tpu("train", "logs", "mine", "--since", "10 minutes", *root_of(run))


def test_a_host_notes_when_its_log_grew(tmp_path: Path) -> None:
    log, times = tmp_path / "host-0.log", iter([10.0, 20.0])
    notes = LogTimes(log, lambda: next(times))
    notes.look()
    log.write_bytes(b"one\n")
    notes.look()
    notes.look()
    log.write_bytes(b"one\ntwo\n")
    notes.look()
    content = times_of(log).read_bytes()
    assert [written_before(content, moment) for moment in (9.0, 10.0, 19.9, 20.0)] == [0, 4, 4, 8]
    log.unlink()
    notes.look()
    assert times_of(log).read_bytes() == content


def test_a_config_file_alone_means_run_and_a_dry_run_changes_nothing(run: RunDirectory, tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text("model: gemma\ntrainer: {steps: 7}\n")
    place = tmp_path / "elsewhere" / "one"
    shown = tpu("train", str(config), "trainer.lr=1e-5", "--output-dir", str(place), "--dry-run")
    assert "7 steps of" in shown
    (settings,) = [text for text in shown.split("\n\n") if text.startswith("cluster:")]
    assert yaml.safe_load(settings)["trainer"]["lr"] == 1e-5
    assert not place.exists()
    assert not list((tmp_path / "state").rglob("cluster.json"))
    result = CliRunner().invoke(app, ["train", str(config), "--resume-from", str(run.path), "--dry-run"])
    assert isinstance(result.exception, PodlaunchError)
    assert "is QUEUED already" in str(result.exception), "it is this run that would go on"
    both = CliRunner().invoke(app, ["train", "run", str(config), "--resume-from", "mine", "--output-dir", "x"])
    assert "name two run directories" in str(both.exception)


def test_version() -> None:
    assert tpu("--version").strip() == importlib.metadata.version("podlaunch")


def test_a_report_is_written_where_it_is_asked_for_and_a_missing_library_is_named(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "page.html"
    assert tpu("train", "report", "mine", *root_of(run), "-o", str(file)).strip() == str(file)
    assert "Run mine" in file.read_text()
    refused = CliRunner().invoke(app, ["train", "report", "mine", *root_of(run), "-o", str(tmp_path / "no" / "page.html")])
    assert "cannot write" in str(refused.exception)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused = CliRunner().invoke(app, ["train", "report", "mine", *root_of(run)])
    assert isinstance(refused.exception, ConfigError)
    assert "pip install 'podlaunch[report]'" in str(refused.exception)


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"state": RunState.STOPPED}, "is STOPPED; only one that trains can be traced"), ({"cluster": "-"}, "in a process of its own")],
)
def test_a_run_that_nobody_can_trace_is_refused(run: RunDirectory, fields: dict[str, Any], words: str) -> None:
    run.write_status(RunStatus(**{"run_id": "mine", "cluster": "c", "state": RunState.QUEUED, **fields}))
    result = CliRunner().invoke(app, ["train", "profile", "mine", *root_of(run)])
    assert isinstance(result.exception, PodlaunchError)
    assert words in str(result.exception)
    assert run.profile_requested() is None
