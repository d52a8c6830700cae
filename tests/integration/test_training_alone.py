"""`python -m launcher.training`: a run in one process, without Ray, that gives what hosts of the same topology give."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import RunDirectory, RunState, RunStatus
from tests.compilations import compilations
from tests.integration.training_gang import ROOT, Gang, evaluations, metrics, write_config


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def command(*arguments: str) -> list[str]:
    return ["env", "--default-signal=INT", sys.executable, "-m", "launcher.training", *arguments]


def environment(cache: Path) -> dict[str, str]:
    own = {"PODLAUNCH_CACHE_DIR": str(cache / "data"), "PODLAUNCH_STATE_DIR": str(cache / "state"), "NO_COLOR": "1"}
    return {**os.environ, **own, "PODLAUNCH_COMPILATION_CACHE": str(compilations()), "PYTHONWARNINGS": "error"}


def alone(cache: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command(*arguments), cwd=ROOT, env=environment(cache), capture_output=True, text=True, timeout=580, check=False)


def curve(run: Path) -> list[tuple[Any, ...]]:
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in metrics(run)]


def status(run: Path) -> RunStatus:
    found = RunDirectory(run).status()
    assert found is not None
    return found


@pytest.mark.timeout(1500)
def test_a_run_alone_is_that_of_a_host_with_as_many_devices_and_is_interrupted_and_resumed(cache: Path, tmp_path: Path) -> None:
    host = write_config(tmp_path / "host", "v4-8", log_every=1, steps=30, checkpoint_every=1000)
    with Gang(host, cache, processes=1, devices=4) as gang:
        assert gang.wait(600) == [0], gang.events
    run = tmp_path / "alone"
    given = ["--config", str(host / "config.yaml"), "--devices", "4", "--output-dir", str(run)]
    process = subprocess.Popen(
        command(*given), cwd=ROOT, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 580
    while not ((run / "metrics.jsonl").exists() and len(metrics(run)) >= 3):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 130, output
    assert "ending at the next step, with a checkpoint" in output
    assert status(run).state is RunState.STOPPED
    step = status(run).checkpoint
    assert step is not None
    assert f"interrupted, with a checkpoint of step {step}" in output
    assert 3 <= step < 30

    refused = alone(cache, *given)
    assert refused.returncode == 2
    assert "run 'alone' exists; go on with it by --resume" in refused.stderr

    resumed = alone(cache, *given, "--resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"restored from the checkpoint of step {step}" in resumed.stdout
    assert "held out" in resumed.stdout
    assert curve(run) == curve(host)
    assert (run / "export" / "model.safetensors").read_bytes() == (host / "export" / "model.safetensors").read_bytes()
    done = status(run)
    assert (done.state, done.attempt, done.step) == (RunState.SUCCEEDED, 1, 30)
    assert done.held_out_after == evaluations(run)[-1]["held_out_loss"] == evaluations(host)[-1]["held_out_loss"]
    assert done.ended_at is not None
    assert sum(done.phases.values()) == pytest.approx(done.ended_at - done.started_at, rel=0.02)


@pytest.mark.timeout(600)
def test_wrong_settings_leave_nothing_behind(cache: Path, tmp_path: Path) -> None:
    for arguments, expected in (
        (["trainer.stepps=1"], "unknown setting 'trainer.stepps'"),
        (["data=jsonl", "data.path=nowhere.jsonl"], "data.path"),
        (["--devices", "3", "trainer.batch_size=8"], "trainer.batch_size 8 is not divisible by the 3 data shards"),
        (["job=script", "job.entrypoint=x.py"], "start it with python itself"),
        (["--resume", "run.name=x"], "there is no run 'x'"),
    ):
        place = [] if "--resume" in arguments else ["--output-dir", str(tmp_path / "run")]
        refused = alone(cache, *arguments, *place)
        assert refused.returncode == 2, refused.stderr
        assert expected in refused.stderr
        assert not (tmp_path / "run").exists()


def test_it_needs_no_ray(cache: Path) -> None:
    code = "import sys, launcher.alone, launcher.training.job; print(json.dumps([m for m in sys.modules if m == 'ray']))"
    done = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"], cwd=ROOT, env=environment(cache), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []
