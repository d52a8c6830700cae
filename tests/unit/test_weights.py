"""Folders of published weights: what is read of them, and every way in which they may be wrong, in one line each."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from launcher.models.config import ModelConfig
from launcher.models.families import gemma
from launcher.models.registry import VARIANTS
from launcher.weights import folder as folder_module
from launcher.weights.check import check_weights, stored_tensors
from launcher.weights.folder import ModelFolder, WeightsError
from launcher.weights.safetensors_format import make_header

TINY = dataclasses.replace(
    VARIANTS["gemma3-nano"], layers=6, d_model=8, heads=2, kv_heads=1, head_dim=4, d_ff=12, vocab=20, window=4, query_scale=4.0
)
MODEL = ModelConfig("gemma3-nano")
SMALL = {"vocab_size": 262_144, "sliding_window": 512, "num_attention_heads": 4, "num_key_value_heads": 1, "rope_scaling": None}
LONG = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024, "model_type": "gemma3_text"}
PUBLISHED: dict[str, dict[str, Any]] = {  # what these files on the hub say of the shape, left out where transformers' default holds
    "gemma3-1b": {
        "model_type": "gemma3_text",
        **SMALL,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_theta": 1000000,
        "sliding_window_pattern": 6,
    },
    "gemma3-4b": {
        "model_type": "gemma3",
        "text_config": {**LONG, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
    },
    "gemma3-12b": {
        "model_type": "gemma3",
        "text_config": {
            **LONG,
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_attention_heads": 16,
            "num_hidden_layers": 48,
            "num_key_value_heads": 8,
        },
    },
    "gemma3-27b": {
        "model_type": "gemma3",
        "text_config": {
            **LONG,
            "head_dim": 128,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_attention_heads": 32,
            "num_hidden_layers": 62,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 168,
        },
    },
    "gemma2-9b": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_attention_heads": 16,
        "num_hidden_layers": 42,
        "num_key_value_heads": 8,
        "query_pre_attn_scalar": 256,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "gemma-2b": {
        "model_type": "gemma",
        "hidden_act": "gelu",
        "head_dim": 256,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "vocab_size": 256000,
    },
}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "gemma3-nano", TINY)


def weights(dtype: Any = np.float32, prefix: str = "model.") -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    names = {tensor.name.replace("model.", prefix, 1): tensor.file_shape for tensor in gemma.hf_tensors(TINY)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in names.items()}


def make(place: Path, tensors: Mapping[str, np.ndarray[Any, Any]], shards: int = 1, **config: Any) -> Path:
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(gemma.hf_config(TINY, "float32", 100) | config))
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), place / "model.safetensors")
    else:
        files = {name: f"model-{i * shards // len(names)}.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: tensors[name] for name in names if files[name] == file}, place / file)
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return place


def model(place: Path) -> ModelConfig:
    return dataclasses.replace(MODEL, weights=str(place))


def refused(place: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        check_weights(model(place))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_published_configuration_is_that_of_its_variant(name: str) -> None:
    ours = vars(VARIANTS[name])
    assert gemma.hf_shape(PUBLISHED[name]) == {field: ours[field] for field in gemma.hf_shape(PUBLISHED[name])}


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_what_is_written_of_a_shape_is_read_again(name: str) -> None:
    read = gemma.hf_shape(gemma.hf_config(VARIANTS[name], "bfloat16", 8192))
    kept = dataclasses.asdict(VARIANTS[name])
    assert read == {field: kept[field] for field in read}
    assert set(kept) - set(read) == {"family", "default_lr", "summary"}
    written = gemma.hf_config(VARIANTS[name], "bfloat16", 8192).get("query_pre_attn_scalar", 0)
    assert isinstance(written, int), "transformers refuses a float"


def test_the_ropes_are_read_as_newer_versions_write_them() -> None:
    config = gemma.hf_config(VARIANTS["gemma3-4b"], "bfloat16", 8192)
    for name in ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern"):
        del config[name]
    full = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    config["rope_parameters"] = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert gemma.hf_shape(config) == gemma.hf_shape(PUBLISHED["gemma3-4b"])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_rows_of_every_tensor_are_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, shards: int) -> None:
    monkeypatch.setattr(folder_module, "CHUNK_BYTES", 50)  # so that most tensors take several requests, cut inside a row
    written = weights(dtype)
    folder = check_weights(model(make(tmp_path / "m", written, shards)))
    assert folder is not None
    for tensor, stored in stored_tensors(MODEL, folder):
        values = written[tensor.name]
        assert folder.rows(stored, 0, len(values)).tobytes() == values.tobytes()
        assert folder.rows(stored, 1, 3).tobytes() == values[1:3].tobytes()
        assert folder.rows(stored, 2, 2).shape == (0, *values.shape[1:])


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    folder = ModelFolder(str(make(tmp_path / "m", weights())))
    stored = folder.tensors["model.embed_tokens.weight"]
    before = folder.bytes_read
    folder.rows(stored, 3, 5)
    assert folder.bytes_read - before == 2 * TINY.d_model * 4


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_model_is_found(tmp_path: Path, prefix: str) -> None:
    text = gemma.hf_config(TINY, "float32", 100)
    place = make(
        tmp_path / "m", weights(prefix=prefix) | {"vision_tower.x": np.zeros(3, np.float32)}, model_type="gemma3", text_config=text
    )
    assert check_weights(model(place)) is not None


def test_another_shape_is_told_by_its_fields(tmp_path: Path) -> None:
    line = refused(make(tmp_path / "m", weights(), num_hidden_layers=7, layer_types=None, sliding_window=5))
    assert "its config.json says layers 7 where gemma3-nano has 6; window 5 where gemma3-nano has 4;" in line.replace(
        "local_per_global 3 where gemma3-nano has 5; ", ""
    )
    assert line.endswith("choose the model.variant of these weights")


def test_another_model_is_told(tmp_path: Path) -> None:
    assert "its model_type is 'llama', known are gemma, gemma2, gemma3_text" in refused(make(tmp_path / "m", weights(), model_type="llama"))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = weights()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    assert "tensor model.layers.1.mlp.up_proj.weight is missing" in refused(make(tmp_path / "m", tensors))


def test_a_tensor_of_another_shape_or_type_is_named(tmp_path: Path) -> None:
    tensors = weights()
    tensors["model.norm.weight"] = np.zeros(9, np.float32)
    assert "tensor model.norm.weight is [9], gemma3-nano has [8]" in refused(make(tmp_path / "m", tensors))
    tensors["model.norm.weight"] = np.zeros(8, np.int8)
    assert "tensor model.norm.weight is of type I8; known are F32, BF16, F16" in refused(make(tmp_path / "m", tensors))


def test_a_damaged_folder_is_told_by_its_file(tmp_path: Path) -> None:
    place = make(tmp_path / "m", weights())
    file = place / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    assert f"model.safetensors is damaged: it is cut off: {len(content) - 10} bytes of {len(content)}" in refused(place)
    file.write_bytes(b"<html>not found</html>")
    assert "model.safetensors is damaged: it does not begin with a safetensors header" in refused(place)
    file.write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    assert "model.safetensors is damaged: its safetensors header cannot be read" in refused(place)
    file.unlink()
    assert "there is no model.safetensors" in refused(place)
    (place / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refused(place)
    (place / "config.json").unlink()
    assert "there is no config.json" in refused(place)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    place = make(tmp_path / "m", weights(), shards=3)
    (place / "model-1.safetensors").unlink()
    assert "there is no model-1.safetensors" in refused(place)


def test_other_values_give_another_fingerprint(tmp_path: Path) -> None:
    tensors = weights()
    place = make(tmp_path / "m", tensors)
    first, again = ModelFolder(str(place)).fingerprint, ModelFolder(str(place)).fingerprint
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    make(place, tensors)
    assert first == again != ModelFolder(str(place)).fingerprint


def test_a_file_that_we_write_is_read_by_the_library(tmp_path: Path) -> None:
    values = np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3)
    header = make_header([("a", (2, 3)), ("b", (2, 3))], values.dtype)
    assert len(header) % 8 == 0
    (tmp_path / "x.safetensors").write_bytes(header + values.tobytes() * 2)
    for read in load_file(tmp_path / "x.safetensors").values():
        assert read.tobytes() == values.tobytes()


@pytest.mark.parametrize("weights", ["s3://bucket/x", "gs://", "gs://bucket", "hf://gemma"])
def test_a_place_that_cannot_be_is_refused_by_its_form(weights: str) -> None:
    from cluster.errors import ConfigError

    with pytest.raises(ConfigError, match=r"give a local path, gs://<bucket>/<folder> or hf://<organisation>/<model>"):
        ModelConfig("gemma3-nano", weights=weights)
