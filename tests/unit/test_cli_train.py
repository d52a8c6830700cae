"""`tpu train`: what it does to run directories."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.config import ClusterConfig
from cluster.errors import PodlaunchError
from launcher.cli.main import app
from launcher.config import LaunchConfig, ModelConfig
from launcher.data.config import DataConfig
from launcher.runs import RunDirectory, RunState, RunStatus, StopRequest


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
