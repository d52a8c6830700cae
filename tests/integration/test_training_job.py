"""A whole job in one process: results, meshes, damaged checkpoints, resumes."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.errors import ConfigError
from launcher.config import LaunchConfig, TrainingConfig
from launcher.data.batches import TrainBatches
from launcher.data.cache import open_packed
from launcher.data.tokenizer import ByteTokenizer
from launcher.training.checkpoint import CheckpointError
from launcher.training.job import NonFinite, TrainingJob, TrainingResult
from launcher.training.manifest import verify
from launcher.training.storage import LocalStorage
from tests.integration.training_gang import ROOT, Gang, evaluations, metrics, write_config


class Recorder:
    """Keeps events."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def emit(self, event: str, **values: Any) -> None:
        self.events.append({"event": event, **values})

    def named(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == name]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PODLAUNCH_CACHE_DIR", str(cache / "data"))


def training(run: Path) -> TrainingConfig:
    """Without its cluster, which would fit the mesh to eight devices."""
    config = LaunchConfig.from_yaml(run / "config.yaml")
    assert config.model
    assert config.data
    return TrainingConfig(config.model, config.data, config.trainer)


def train(run: Path, attempt: int = 0, **job: Any) -> tuple[TrainingResult, Recorder]:
    recorder = Recorder()
    return TrainingJob(training(run), run, recorder, attempt=attempt, **job).run(), recorder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PODLAUNCH_CACHE_DIR", str(cache / "data"))
        run = write_config(tmp_path_factory.mktemp("runs") / "finished")
        train(run)
    return run


def copy(finished: Path, tmp_path: Path, **trainer: Any) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return write_config(tmp_path / "run", **trainer)


def test_a_job_leaves_metrics_checkpoints_tensorboard_and_export(tmp_path: Path) -> None:
    run = write_config(tmp_path / "run")
    result, recorder = train(run, peak_flops=1e12)
    records = metrics(run)
    assert [record["step"] for record in records] == [1, 3, 6, 8]
    assert set(records[0]) == {"step", "attempt", "time", "loss", "lr", "grad_norm", "update_norm", "tokens_per_second", "mfu", "step_time"}
    assert records[0]["mfu"] > 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["3", "6", "8"]
    assert sorted(path.name for path in (run / "export").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [event["phase"] for event in recorder.named("phase")] == [
        *("data", "compiling", "restoring", "initializing", "evaluating", "training"),
        *("saving", "training") * 2,
        *("saving", "evaluating", "saving", "exporting"),
    ]
    assert recorder.events[-1] == {"event": "finished", "step": 8, "loss": result.loss}
    assert recorder.named("step")[0]["step"] == 1
    assert recorder.named("step")[-1]["step"] == 8
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [scalar.step for scalar in board.Scalars("train/loss")] == [1, 3, 6, 8]
    assert result.held_out_before is not None
    assert result.held_out_after < result.held_out_before - 1


def test_evaluation_every_so_many_steps_is_recorded_and_changes_nothing(finished: Path, tmp_path: Path) -> None:
    run = write_config(tmp_path / "run", eval_every=3)
    result, recorder = train(run)
    events = recorder.named("evaluation")
    assert [(event["when"], event["step"]) for event in events] == [("before", 0), ("during", 3), ("during", 6), ("after", 8)]
    rows = evaluations(run)
    assert [row["step"] for row in rows] == [0, 3, 6, 8]
    assert [row["held_out_loss"] for row in rows] == [event["loss"] for event in events]
    assert rows[-1]["held_out_loss"] == result.held_out_after
    assert rows[-1]["held_out_perplexity"] == pytest.approx(np.exp(result.held_out_after))
    assert [row["loss"] for row in metrics(run)] == [row["loss"] for row in metrics(finished)]
    phases = [event["phase"] for event in recorder.named("phase")]
    assert phases[5:12] == ["training", "saving", "evaluating", "training", "saving", "evaluating", "training"]
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [scalar.step for scalar in board.Scalars("held_out/perplexity")] == [0, 3, 6, 8]
    recorder = train(copy(run, tmp_path / "again", steps=9), attempt=1)[1]
    assert [(event["when"], event["step"]) for event in recorder.named("evaluation")] == [("after", 9)]


def test_a_small_learning_rate_still_lowers_the_held_out_loss_of_each_part_of_a_mixture(tmp_path: Path) -> None:
    run = write_config(tmp_path / "run", lr=1e-5, steps=12)
    values = yaml.safe_load((run / "config.yaml").read_text())
    parts = {name: {"source": "text", "path": str(ROOT / name)} for name in ("launcher", "cluster")}
    (run / "config.yaml").write_text(yaml.safe_dump(values | {"data": {"source": "mixture", "parts": parts, "held_out": 0.1}}))
    result, recorder = train(run)
    assert result.held_out_before is not None
    assert result.held_out_after < result.held_out_before
    before, after = recorder.named("evaluation")
    assert set(before["parts"]) == {"launcher", "cluster"}
    for name, loss in before["parts"].items():
        assert after["parts"][name] < loss
        assert min(before["parts"].values()) < before["loss"] < max(before["parts"].values())
    assert [row["held_out_parts"] for row in evaluations(run)] == [before["parts"], after["parts"]]
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [scalar.step for scalar in board.Scalars("held_out_parts/cluster")] == [0, 12]


def test_keep_checkpoints_is_kept(tmp_path: Path) -> None:
    run = write_config(tmp_path / "run", keep_checkpoints=1, checkpoint_every=2)
    train(run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["8"]


def test_a_finished_run_resumed_trains_nothing_and_exports_the_same(finished: Path, tmp_path: Path) -> None:
    run = copy(finished, tmp_path)
    shutil.rmtree(run / "export")
    result, recorder = train(run, attempt=1)
    assert result.loss is None
    assert recorder.named("step") == []
    assert (run / "export" / "model.safetensors").read_bytes() == (finished / "export" / "model.safetensors").read_bytes()


def flip_a_byte(checkpoint: Path) -> None:
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(finished: Path, tmp_path: Path) -> None:
    run = copy(finished, tmp_path)
    flip_a_byte(run / "checkpoints" / "8")
    (run / "checkpoints" / "6" / "manifest.json").unlink()
    (run / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    _, recorder = train(run, attempt=1)
    aside = recorder.named("checkpoint_set_aside")
    assert [event["step"] for event in aside] == [8, 6]
    assert "checksum" in aside[0]["reason"]
    assert aside[1]["reason"] == "it has no manifest"
    assert recorder.named("restored") == [{"event": "restored", "step": 3}]
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["3", "6", "6.bad-1", "8", "8.bad-1"]
    assert metrics(run)[-1]["loss"] == metrics(finished)[-1]["loss"]
    assert (run / "export" / "model.safetensors").read_bytes() == (finished / "export" / "model.safetensors").read_bytes()


def test_no_good_checkpoint_stops_and_stays_stopped(finished: Path, tmp_path: Path) -> None:
    run = copy(finished, tmp_path)
    for checkpoint in (run / "checkpoints").iterdir():
        flip_a_byte(checkpoint)
    for attempt in (1, 2):
        with pytest.raises(CheckpointError, match=r"no usable checkpoint in .* all were set aside"):
            train(run, attempt=attempt)
    assert metrics(run) == metrics(finished)


def test_a_checkpoint_of_another_model_is_refused_by_name(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from launcher.models.registry import VARIANTS

    run = copy(finished, tmp_path)
    monkeypatch.setitem(VARIANTS, "gemma3-nano", dataclasses.replace(VARIANTS["gemma3-nano"], d_ff=384))
    with pytest.raises(ConfigError, match=r"checkpoint 8 was made with other settings: model.d_ff from \d+ to 384;"):
        train(run, attempt=1)
    with pytest.raises(CheckpointError, match=r"checkpoints/8 does not fit this model"):
        train(run, attempt=1, allow=["model"])


def test_a_torn_last_line_of_metrics_does_not_swallow_the_next(finished: Path, tmp_path: Path) -> None:
    run = copy(finished, tmp_path, steps=10)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "att')
    train(run, attempt=1)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    torn = lines.index('{"step": 9, "att')
    assert [json.loads(line)["step"] for line in lines[torn + 1 :]] == [9, 10, 10]


def test_cleanup_may_be_called_at_any_time_and_twice(tmp_path: Path) -> None:
    run = write_config(tmp_path / "run")
    job = TrainingJob(training(run), run)
    job.cleanup()
    job.prepare()
    job.cleanup()
    job.cleanup()
    with pytest.raises(RuntimeError, match="prepare"):
        job.execute()


@pytest.mark.long
@pytest.mark.parametrize("mesh", [{}, {"fsdp": 8}, {"fsdp": 2, "sequence": 2, "tensor": 2}])
def test_eight_devices_learn_what_one_learns(finished: Path, cache: Path, tmp_path: Path, mesh: dict[str, int]) -> None:
    run = write_config(tmp_path / "run", mesh=mesh)
    with Gang(run, cache, processes=1, devices=8) as gang:
        assert gang.wait() == [0], gang.named("error")
    for ours, theirs in zip(metrics(run), metrics(finished), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)
    weights, expected = (load_file(r / "export" / "model.safetensors") for r in (run, finished))
    for name, values in weights.items():
        np.testing.assert_allclose(values, expected[name], atol=5e-3, err_msg=name)


@pytest.mark.long
def test_bfloat16_learns_and_exports_bfloat16(tmp_path: Path) -> None:
    run = write_config(tmp_path / "run", compute_dtype="bfloat16")
    result, _ = train(run)
    assert result.held_out_before is not None
    assert result.held_out_after < result.held_out_before - 1
    header = (run / "export" / "model.safetensors").read_bytes()[8:400]
    assert b'"BF16"' in header


def test_a_loss_that_is_no_number_stops_with_step_and_rows_and_the_last_checkpoint_stands(tmp_path: Path) -> None:
    run = write_config(tmp_path / "run", lr=1e15, steps=1000, log_every=100, warmup_steps=0, checkpoint_every=1)
    with pytest.raises(NonFinite) as caught:
        train(run)
    line = str(caught.value)
    found = re.fullmatch(
        r"(loss|grad_norm|update_norm) is (nan|inf) at step (\d+), training stopped; the documents of its batch begin at (.*); "
        r"checkpoint (\d+) is from before it; .*run.resume=true run.allow=\[optimizer,data\]",
        line,
    )
    assert found, line
    step, places, good = int(found[3]), found[4].split("; "), int(found[5])
    assert good == step - 1
    config = training(run)
    data = open_packed(config.data, ByteTokenizer(), config.trainer.seq_len)
    expected = TrainBatches(data.train, 8, config.trainer.seed).places(step - 1)
    assert places == expected
    assert re.fullmatch(r"\w+\.py, line 1", places[0])
    assert verify(LocalStorage(run / "checkpoints"), str(good)) is None
