"""The estimates of memory and time, and the mesh chosen by them. Whether they are right, the compiler judges (tests/integration)."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError
from cluster.tpu.catalog import lookup, resolve
from launcher.config import LaunchConfig, TrainingConfig
from launcher.estimate.choose import choose_mesh
from launcher.estimate.memory import GIB, estimate_memory
from launcher.estimate.roofline import estimate_time
from launcher.estimate.run import ERROR, check_memory, estimate_of
from launcher.estimate.step import StepShape
from launcher.mesh import MeshConfig
from launcher.models.config import LoraConfig, ModelConfig


def training(variant: str = "gemma3-4b", **trainer: Any) -> TrainingConfig:
    settings = {"batch_size": 32, "seq_len": 2048, "compute_dtype": "bfloat16", **trainer}
    return TrainingConfig.from_dict({"model": {"variant": variant}, "data": {"source": "python_stdlib"}, "trainer": settings})


def launch(accelerator_type: str, variant: str = "gemma3-4b", slices: int = 1, **trainer: Any) -> LaunchConfig:
    cluster = {"name": "mine", "accelerator_type": accelerator_type, "slices": slices, "project": "my-project", "zones": ["us-east5-b"]}
    return LaunchConfig.from_dict({**training(variant, **trainer).to_dict(), "cluster": cluster})


def step(config: TrainingConfig, chips: int, slices: int = 1, **mesh: int) -> StepShape:
    return StepShape(config, MeshConfig(**mesh).resolve(chips, slices))


def test_weights_and_optimizer_are_split_over_fsdp_and_tensor_and_not_over_data() -> None:
    config = training()
    whole = estimate_memory(step(config, 16))
    for mesh in ({"fsdp": 16}, {"fsdp": 8, "tensor": 2}):
        part = estimate_memory(step(config, 16, **mesh))
        assert part.parameters == pytest.approx(whole.parameters / 16, rel=0.01)
        assert part.optimizer == 2 * part.parameters
    assert whole.parameters == pytest.approx(config.model.shape.parameters * 4, rel=1e-6)


def test_of_adapters_alone_there_are_gradients_and_moments_and_the_rest_is_frozen_in_the_compute_type() -> None:
    full = training(mesh={"fsdp": 16})
    rank = 16
    lora = dataclasses.replace(full, model=ModelConfig("gemma3-4b", weights="hf://google/any", lora=LoraConfig(rank=rank)))
    shape = full.model.shape
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sides = 2 * (shape.d_model + queries) + 2 * (shape.d_model + keys) + 3 * (shape.d_model + shape.d_ff)
    trained = shape.layers * rank * sides
    whole = step(lora, 1, fsdp=1)
    assert sum(weight.size for weight in whole.weights if weight.trained) == trained
    assert sum(weight.size for weight in whole.weights if not weight.trained) == shape.parameters
    estimate = estimate_memory(whole)
    assert estimate.optimizer == pytest.approx(2 * 4 * trained)
    assert estimate.parameters == pytest.approx(4 * trained + 2 * shape.parameters, rel=0.01)
    assert estimate_memory(step(lora, 16, fsdp=16)).total < 0.5 * estimate_memory(step(full, 16, fsdp=16)).total
    some = dataclasses.replace(lora, model=dataclasses.replace(lora.model, lora=LoraConfig(rank=rank, targets=["q_proj"])))
    adapters = [weight for weight in step(some, 16, fsdp=8, tensor=2).weights if weight.trained]
    assert [(weight.size, weight.shards, weight.gathered) for weight in adapters] == [
        (shape.layers * rank * shape.d_model, 8, 8),
        (shape.layers * rank * queries, 2, 1),
    ]


def test_an_optimizer_takes_what_it_remembers() -> None:
    parameters = training().model.shape.parameters
    taken = {name: estimate_memory(step(training(optimizer=name), 1)).optimizer for name in ("adamw", "sgd", "adafactor")}
    assert taken["adamw"] == 2 * taken["sgd"] == pytest.approx(8 * parameters)
    assert taken["adafactor"] < 0.01 * taken["sgd"]


def test_parts_of_a_batch_take_less_at_a_time_and_a_second_set_of_gradients() -> None:
    whole, parts = (estimate_memory(step(training(batch_size=256, accumulate=n), 16, fsdp=16)) for n in (1, 8))
    assert parts.activations == whole.activations / 8
    assert parts.batch == whole.batch
    assert parts.gradients == whole.gradients + whole.parameters
    assert parts.total < whole.total


def test_neither_the_table_nor_its_gradient_is_whole_on_a_chip() -> None:
    config = training("gemma3-270m")
    table = next(weight for weight in step(config, 16, fsdp=8, tensor=2).weights if weight.name == "embedding")
    assert table.used == table.held == config.model.shape.vocab * config.model.shape.d_model / 16


def test_every_remat_policy_keeps_less_than_the_one_before_it() -> None:
    kept = [estimate_memory(step(training(remat=remat), 16, fsdp=16)).activations for remat in ("none", "dots", "full")]
    assert kept[0] > kept[1] > kept[2] > 0


def test_the_loss_is_kept_in_bounds_by_its_chunks() -> None:
    sizes = [estimate_memory(step(training(batch_size=batch), 16, fsdp=16)).loss_chunk for batch in (32, 64, 512)]
    assert max(sizes) < 0.6 * GIB


def test_a_small_model_is_not_split_more_than_it_has_to_be_and_a_large_one_is() -> None:
    small = choose_mesh(training("gemma3-270m"), lookup("v5p-32"), 1)
    assert (small.tensor, small.sequence) == (1, 1)
    large = choose_mesh(training("gemma3-27b", batch_size=64), lookup("v6e-64"), 1)
    assert large.shape["fsdp"] * large.shape["tensor"] >= 32


def test_what_the_user_gives_is_kept_and_the_rest_is_chosen() -> None:
    config = training("gemma3-4b", mesh={"tensor": 4})
    mesh = choose_mesh(config, lookup("v6e-16"), 1)
    assert mesh.tensor == 4
    assert mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["sequence"] == 4


@pytest.mark.parametrize("slices", [1, 2])
def test_a_long_sequence_of_few_is_split_itself(slices: int) -> None:
    mesh = choose_mesh(training("gemma3-1b", batch_size=2, seq_len=32_768), lookup("v6e-16"), slices)
    assert mesh.batch_shards <= 2
    assert mesh.shape["sequence"] * mesh.shape["tensor"] >= 8
    assert mesh.slices == slices


def test_what_cannot_fit_is_refused_in_one_line_that_says_what_would() -> None:
    with pytest.raises(ConfigError) as caught:
        _ = launch("v6e-8", "gemma3-27b", batch_size=256)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("gemma3-27b with trainer.batch_size=256 and trainer.seq_len=2048 needs about ")
    assert "cluster.accelerator_type=v6e-" in line
    assert "of 30.7 GiB" in line
    larger = line.partition("cluster.accelerator_type=")[2].split(";")[0].strip()
    assert estimate_of(launch(larger, "gemma3-27b", batch_size=256)).fits


def test_a_mesh_of_the_users_that_cannot_fit_is_refused_before_anything_starts() -> None:
    config = launch("v5litepod-16", "gemma3-4b", batch_size=16, mesh={"data": -1})
    with pytest.raises(ConfigError, match=r"needs about \d\d\.\d GiB a chip .* would fit: trainer\.mesh=auto \("):
        check_memory(config)


def test_a_batch_that_no_mesh_divides_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.batch_size 7 is not divisible"):
        choose_mesh(training("gemma3-nano", batch_size=7, seq_len=100), lookup("v6e-8"), 1)


def test_emulated_hosts_train_data_parallel_unless_told_otherwise() -> None:
    groups = {"model": {"variant": "gemma3-nano"}, "data": {"source": "python_stdlib"}}
    cluster = {"name": "local", "cloud": "emulated", "accelerator_type": "v4-16"}
    chosen = LaunchConfig.from_dict({**groups, "cluster": cluster}).training_on_slices.trainer.mesh
    assert chosen.shape == {"slice": 1, "data": 8, "fsdp": 1, "sequence": 1, "tensor": 1}
    asked = LaunchConfig.from_dict({**groups, "cluster": cluster, "trainer": {"mesh": {"fsdp": 8}}}).training_on_slices.trainer.mesh
    assert asked.fsdp == 8


def test_auto_is_all_open() -> None:
    config = TrainingConfig.from_dict(
        {"model": {"variant": "gemma3-nano"}, "data": {"source": "python_stdlib"}, "trainer": {"mesh": "auto"}}
    )
    assert config.trainer.mesh == MeshConfig()
    with pytest.raises(ConfigError, match=r"trainer\.mesh 'atuo': give auto"):
        TrainingConfig.from_dict({**config.to_dict(), "trainer": {"mesh": "atuo"}})


def test_the_roofline_of_a_large_model_is_its_flops() -> None:
    kind = resolve("v6e-16")
    config = training("gemma3-4b", batch_size=256)
    time = estimate_time(step(config, 16, fsdp=16), kind, usd_per_hour=43.2)
    assert time.bound == "compute"
    tokens = 256 * 2048
    assert time.model_flops * 16 == pytest.approx(config.model.shape.flops_per_token(2048) * tokens)
    assert time.hardware_flops == pytest.approx(time.model_flops * 4 / 3, rel=0.06)
    assert 0.7 < time.mfu < 0.8
    assert time.tokens_per_second == pytest.approx(tokens / time.step_s)
    assert time.usd_per_billion_tokens == pytest.approx(43.2 / 3600 / time.tokens_per_second * 1e9)


def test_only_gradients_cross_slices_and_only_with_several() -> None:
    config, kind = training(), lookup("v6e-16")
    one, two = (estimate_time(step(config, 16 * n, n, fsdp=16), kind) for n in (1, 2))
    assert (one.dcn_bytes, one.dcn_s) == (0.0, 0.0)
    assert two.dcn_bytes == pytest.approx(config.model.shape.parameters * 4 / 16, rel=0.01)


def test_more_bandwidth_makes_no_step_slower() -> None:
    kind = lookup("v5litepod-16")
    faster = dataclasses.replace(kind, ici_gb_per_s=2 * kind.ici_gb_per_s, hbm_gb_per_s=2 * kind.hbm_gb_per_s)
    config = step(training("gemma3-1b", batch_size=16), 16, fsdp=16)
    assert estimate_time(config, faster).step_s <= estimate_time(config, kind).step_s


def test_a_mesh_of_several_slices_is_resolved_slice_by_slice() -> None:
    mesh = MeshConfig(data=1, fsdp=-1).resolve(32, 2)
    assert mesh.shape == {"slice": 2, "data": 1, "fsdp": 16, "sequence": 1, "tensor": 1}
    assert mesh.batch_shards == 32
    assert mesh.describe() == "slice 2 x fsdp 16"
    with pytest.raises(ConfigError, match="does not divide 16 devices of a slice"):
        MeshConfig(fsdp=3).resolve(32, 2)
    with pytest.raises(ConfigError, match=r"trainer\.mesh\.slices is 3 and the run has 2"):
        MeshConfig(slices=3).resolve(32, 2)


PLANS = Path(__file__).parents[2] / "docs" / "tpu-compiler.jsonl"
"""What benchmarks/tpu_compile.py found out: a line a point."""


def test_the_estimate_of_memory_is_within_its_error_of_every_plan_that_the_compiler_made() -> None:
    ratios = {}
    for line in PLANS.read_text().splitlines():
        row = json.loads(line)
        if row["compiler"]["total_bytes"] is None:
            continue
        size, kind, _ = row["point"].split("-", 2)
        mesh = {axis: ways for axis, ways in row["mesh"].items() if axis != "slice"}
        config = training(f"gemma3-{size}", batch_size=row["batch_size"], seq_len=row["seq_len"], remat=row["remat"])
        if kind == "lora":
            config = dataclasses.replace(config, model=ModelConfig(f"gemma3-{size}", weights="hf://google/any", lora=LoraConfig(rank=16)))
        estimate = estimate_memory(step(config, row["chips"], row["slices"], **mesh))
        code = 0.0 if row["compiler"]["compiles"] else estimate.program  # there is none before the compiler has come to its end
        ratios[row["point"]] = (estimate.total - code) / row["compiler"]["total_bytes"]
    assert len(ratios) > 30
    assert {name for name, value in ratios.items() if abs(value - 1) > ERROR} == set()
