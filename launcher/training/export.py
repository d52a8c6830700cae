"""The trained model as a Hugging Face folder: config.json, model.safetensors, tokenizer files."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from launcher.config import TrainingConfig
from launcher.data.tokenizer import Tokenizer
from launcher.models import lora
from launcher.models.hf import HFTensor
from launcher.models.interface import Params
from launcher.models.registry import FAMILIES
from launcher.training.mesh import Layout
from launcher.training.processes import is_main, wait_for_all
from launcher.weights.folder import CONFIG, INDEX, SINGLE
from launcher.weights.safetensors_format import make_header

MAX_POSITIONS = 32_768
"""Gemma 3's smallest published context; rotary positions have no table that ends."""
FILE_BYTES = 5_000_000_000
"""What one safetensors file holds at most, as on the hub."""
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
"""Of the config.json that a model was loaded with."""


def export_model(
    params: Params,
    config: TrainingConfig,
    tokenizer: Tokenizer,
    folder: Path,
    layout: Layout,
    loaded: Mapping[str, Any] | None = None,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write the folder and return it; collective. Weights are stored in the compute type.

    `loaded`: the config.json that the model began with. Tensors are brought together one at a time and written as they come, so that no
    host ever holds the model whole. The folder appears with one rename: it is complete or it is not there.
    """
    building = folder.with_name(f"{folder.name}.building")
    files = _files(config, file_bytes)
    if is_main():
        shutil.rmtree(building, ignore_errors=True)  # left by an attempt that was killed
        building.mkdir(parents=True)
        _write_config(building, config, tokenizer, loaded or {})
        _write_index(building, files)
    for name, tensors in files.items():
        if is_main():
            with (building / name).open("wb") as file:
                file.write(make_header([(tensor.name, tensor.file_shape) for tensor in tensors], _dtype(config)))
                for values in _values(params, config, layout, tensors):
                    file.write(values.tobytes())
        else:
            for _ in _values(params, config, layout, tensors):
                pass
    if is_main():
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt, or of a shorter run that was gone on with
        building.rename(folder)
    wait_for_all("export")
    return folder


def export_adapters(params: Params, config: TrainingConfig, tokenizer: Tokenizer, folder: Path, layout: Layout) -> Path:
    """Write the adapters alone, in float32 and PEFT's format, with the tokenizer; collective. The folder appears with one rename."""
    building = folder.with_name(f"{folder.name}.building")
    arrays: list[tuple[str, np.ndarray[Any, Any]]] = []
    for tensor in _tensors(config):
        place = _place(params, tensor)
        if tensor.layer is not None and lora.A in place:
            inputs, outputs = tensor.shape
            a, b = (_gathered(place[name], tensor.layer, layout) for name in (lora.A, lora.B))
            name = f"base_model.model.{tensor.name.removesuffix('.weight')}"
            arrays += [(f"{name}.lora_A.weight", a.reshape(inputs, -1).T), (f"{name}.lora_B.weight", b.reshape(-1, outputs).T)]
    if is_main():
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        _write_json(building / "adapter_config.json", _adapter_config(config))
        with (building / "adapter_model.safetensors").open("wb") as file:
            file.write(make_header([(name, values.shape) for name, values in arrays], np.dtype(np.float32)))
            for _, values in arrays:
                file.write(values.astype(np.float32).tobytes())
        tokenizer.save(building)
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    wait_for_all("export")
    return folder


def _adapter_config(config: TrainingConfig) -> dict[str, Any]:
    """`adapter_config.json` as PEFT reads it."""
    settings = config.model.lora
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": (config.model.weights or "").removeprefix("hf://").partition("@")[0],
        "r": settings.rank,
        "lora_alpha": settings.scale * settings.rank,
        "lora_dropout": settings.dropout,
        "target_modules": list(settings.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
    }


def _values(params: Params, config: TrainingConfig, layout: Layout, tensors: list[HFTensor]) -> Iterator[np.ndarray[Any, Any]]:
    """These tensors of the file in their order, gathered from all devices; collective."""
    for tensor in tensors:
        place = _place(params, tensor)
        values = _gathered(place[tensor.path[-1]], tensor.layer, layout).reshape(tensor.shape)
        if tensor.layer is not None and lora.A in place:
            inputs, outputs = tensor.shape
            a, b = (_gathered(place[name], tensor.layer, layout) for name in (lora.A, lora.B))
            values = values.astype(np.float32) + a.reshape(inputs, -1) @ b.reshape(-1, outputs) * config.model.lora.scale
        yield (values.T if tensor.transpose else values).astype(config.trainer.compute_dtype)


def _gathered(weight: jax.Array, layer: int | None, layout: Layout) -> np.ndarray[Any, Any]:
    """A weight, or one layer's entry of it, from all devices; collective."""
    if layer is None:
        whole = jax.jit(_whole, out_shardings=layout.replicated)(weight)
    else:
        whole = jax.jit(_entry, out_shardings=layout.replicated)(weight, layer)
    return np.asarray(whole.addressable_data(0))


def _place(params: Params, tensor: HFTensor) -> Params:
    """The dict that holds the tensor's weight, and those of its adapter."""
    for name in tensor.path[:-1]:
        params = params[name]
    return params


def _entry(weight: jax.Array, layer: int) -> jax.Array:
    return weight[layer]


def _whole(weight: jax.Array) -> jax.Array:
    return weight


def _tensors(config: TrainingConfig) -> Iterator[HFTensor]:
    return FAMILIES[config.model.family].hf_tensors(config.model.shape)


def _files(config: TrainingConfig, file_bytes: int) -> dict[str, list[HFTensor]]:
    """Name of each file -> its tensors: one file, or as many as are needed."""
    files: list[list[HFTensor]] = [[]]
    filled = 0
    for tensor in _tensors(config):
        size = _bytes(config, tensor)
        if files[-1] and filled + size > file_bytes:
            files.append([])
            filled = 0
        files[-1].append(tensor)
        filled += size
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{i:05}-of-{len(files):05}.safetensors": tensors for i, tensors in enumerate(files, start=1)}


def _bytes(config: TrainingConfig, tensor: HFTensor) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * _dtype(config).itemsize


def _dtype(config: TrainingConfig) -> np.dtype[Any]:
    return np.dtype(config.trainer.compute_dtype)


def _write_index(folder: Path, files: Mapping[str, list[HFTensor]]) -> None:
    if len(files) == 1:
        return
    weight_map = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
    _write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})


def _write_config(folder: Path, config: TrainingConfig, tokenizer: Tokenizer, loaded: Mapping[str, Any]) -> None:
    model = FAMILIES[config.model.family].hf_config(config.model.shape, config.trainer.compute_dtype, MAX_POSITIONS)
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    known = {**loaded.get("text_config", {}), **loaded}
    _write_json(folder / CONFIG, model | ids | {name: known[name] for name in _KEPT if known.get(name) is not None})
    tokenizer.save(folder)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
