"""LaunchConfig and TrainingConfig: what is accepted, what is refused and in which words."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from launcher.config import LaunchConfig, TrainerConfig, TrainingConfig
from launcher.mesh import MeshConfig
from launcher.models.registry import VARIANTS

MODEL = {"variant": "gemma3-nano"}
DATA = {"source": "python_stdlib"}
CLUSTER = {"name": "local", "cloud": "emulated", "accelerator_type": "v4-16"}


def launch_config(**groups: dict[str, Any]) -> LaunchConfig:
    return LaunchConfig.from_dict({"model": MODEL, "data": DATA, "cluster": CLUSTER, **groups})


def test_training_config_survives_a_round_trip_through_yaml(tmp_path: Path) -> None:
    config = TrainingConfig.from_dict({"model": MODEL, "data": DATA, "trainer": {"lr": 1e-5, "mesh": {"fsdp": 2}}})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert TrainingConfig.from_yaml(path) == config


@given(
    st.builds(
        TrainerConfig,
        steps=st.integers(1, 10**6),
        batch_size=st.integers(1, 4096),
        seq_len=st.integers(8, 8192),
        lr=st.none() | st.floats(1e-9, 1.0),
        warmup_steps=st.integers(0, 1000),
        max_grad_norm=st.floats(1e-3, 100.0),
        seed=st.integers(0, 2**31),
    )
)
def test_any_valid_trainer_config_survives_a_round_trip(trainer: TrainerConfig) -> None:
    config = TrainingConfig.from_dict({"model": MODEL, "data": DATA, "trainer": dataclasses.asdict(trainer)})
    assert TrainingConfig.from_dict(config.to_dict()) == config
    assert config.trainer == trainer


@pytest.mark.parametrize(
    ("group", "values", "expected"),
    [
        ("trainer", {"lrr": 1}, "unknown setting 'trainer.lrr'; did you mean 'trainer.lr'?"),
        ("trainer", {"steps": "many"}, "trainer.steps: expected a whole number, got 'many'"),
        ("trainer", {"steps": True}, "trainer.steps: expected a whole number, got True"),
        ("trainer", {"steps": 0}, "trainer.steps 0: give a whole number of at least 1"),
        ("trainer", {"lr": -1.0}, "trainer.lr -1.0: give a positive number"),
        ("trainer", {"lr": float("nan")}, "trainer.lr nan: give a positive number"),
        ("trainer", {"compute_dtype": "bf16"}, "did you mean 'bfloat16'?"),
        ("trainer", {"remat": "al"}, "trainer.remat 'al' is unknown"),
        ("trainer", {"optimizer": "adam"}, "trainer.optimizer 'adam' is unknown; did you mean 'adamw'?"),
        ("trainer", {"schedule": "cosin"}, "did you mean 'cosine'?"),
        ("trainer", {"no_decay": ["norms"]}, "trainer.no_decay: 'norms' is unknown; did you mean 'norm'?"),
        ("trainer", {"accumulate": 3, "batch_size": 16}, "trainer.accumulate 3 does not divide the 2 sequences of a data shard"),
        ("model", {**MODEL, "lora": {"rank": 8}}, "model.lora.rank needs model.weights"),
        ("model", {**MODEL, "lora": {"rank": -1}}, "model.lora.rank -1: give a whole number of at least 0"),
        ("model", {**MODEL, "lora": {"alpha": 0.0}}, "model.lora.alpha 0.0: give a positive number"),
        ("model", {**MODEL, "lora": {"dropout": 1.0}}, "model.lora.dropout 1.0: give a number from 0 to below 1"),
        ("model", {**MODEL, "lora": {"targets": ["query"]}}, "model.lora.targets: 'query' is unknown"),
        ("trainer", {"batch_size": 12}, "batch_size 12 is not divisible by the 8 data shards"),
        ("trainer", {"mesh": {"fsdp": 3}}, "does not divide 8 devices"),
        ("trainer", {"mesh": {"data": -1, "fsdp": -1}}, "at most one of them is -1"),
        ("trainer", {"mesh": {"data": 1, "fsdp": 1, "tensor": 8}}, "trainer.mesh.tensor 8 does not divide the model's heads of 4"),
        ("trainer", {"checkpoint_every": "often"}, "trainer.checkpoint_every 'often': give steps (20), a length of time"),
        ("trainer", {"checkpoint_every": 2.5}, "trainer.checkpoint_every: expected a whole number or text, got 2.5"),
        ("trainer", {"keep_every": 0}, "trainer.keep_every 0: give a whole number of at least 1"),
        ("run", {"allow": ["sede"]}, "run.allow: 'sede' is nothing that a resume checks; did you mean 'seed'?"),
        ("run", {"max_hours": 0}, "run.max_hours 0.0: give a positive number, or null for no limit"),
        ("run", {"hang": {"steps": 0}}, "run.hang.steps 0.0: give a number of at least 1"),
        ("run", {"hang": {"floor": "never"}}, "run.hang.floor 'never' is no length of time"),
        ("run", {"budget": {"oom": -1}}, "run.budget.oom -1: give a whole number of at least 0"),
        ("run", {"budget": {"backoff": "soon"}}, "run.budget.backoff 'soon' is no length of time"),
        ("run", {"budget": {"preemptd": 1}}, "did you mean 'run.budget.preempted'?"),
        ("model", {"variant": "gemma3-270"}, "did you mean 'gemma3-270m'?"),
        ("model", {"variant": "gemma3-nano", "family": "gema"}, "did you mean 'gemma'?"),
        ("data", {"source": "csv"}, "data.source 'csv' is unknown"),
        ("data", {"source": "text"}, "data.path is missing"),
        ("data", {"source": "python_stdlib", "path": "x"}, "data.path does not belong"),
        ("data", {"source": "python_stdlib", "held_out": 1.5}, "data.held_out 1.5"),
        ("run", {"name": "No Spaces"}, "run.name 'No Spaces'"),
        ("run", {"resume": True}, "run.resume=true needs run.name"),
        ("cluster", {**CLUSTER, "accelerator_type": "v4-17"}, "'v4-17' does not exist; nearest: v4-8"),
        ("cluster", {"name": "x", "cloud": "emulated", "generation": "v4", "topology": "3x3"}, "topology '3x3' does not exist"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(group: str, values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        launch_config(**{group: values})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_group_is_named() -> None:
    with pytest.raises(ConfigError, match="missing setting 'model'"):
        LaunchConfig.from_dict({"data": DATA, "cluster": CLUSTER})


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: b: c", "\x00"])
def test_a_file_that_holds_no_mapping_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        TrainingConfig.from_yaml(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot read nowhere\.yaml"):
        TrainingConfig.from_yaml("nowhere.yaml")


@pytest.mark.parametrize(
    ("mesh", "devices", "expected"),
    [
        (MeshConfig(), 8, (8, 1, 1)),
        (MeshConfig(data=1, fsdp=-1), 8, (1, 8, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), 8, (2, 2, 2)),
        (MeshConfig(data=-1, tensor=4), 16, (4, 1, 4)),
    ],
)
def test_mesh_fills_in_what_is_left(mesh: MeshConfig, devices: int, expected: tuple[int, int, int]) -> None:
    resolved = mesh.resolve(devices)
    assert (resolved.data, resolved.fsdp, resolved.tensor) == expected


def test_the_learning_rate_comes_from_the_variant_unless_given() -> None:
    config = launch_config().training
    assert config.learning_rate == VARIANTS["gemma3-nano"].default_lr
    assert launch_config(trainer={"lr": 1e-5}).training.learning_rate == 1e-5
