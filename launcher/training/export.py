"""The trained model as a Hugging Face folder: config.json, model.safetensors, tokenizer files."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from launcher.config import TrainingConfig
from launcher.data.tokenizer import Tokenizer
from launcher.models.hf import HFTensor
from launcher.models.interface import Params
from launcher.models.registry import FAMILIES
from launcher.training.mesh import Layout
from launcher.training.processes import is_main, wait_for_all

_SAFETENSORS_TYPES = {"float32": "F32", "bfloat16": "BF16"}
MAX_POSITIONS = 32_768
"""Gemma 3's smallest published context; rotary positions have no table that ends."""


def export_model(params: Params, config: TrainingConfig, tokenizer: Tokenizer, folder: Path, layout: Layout) -> Path:
    """Write the folder and return it; collective. Weights are stored in the compute type.

    Tensors are brought together one at a time and written as they come, so that no host ever holds the model whole. The folder
    appears with one rename: it is complete or it is not there.
    """
    building = folder.with_name(f"{folder.name}.building")
    if is_main():
        shutil.rmtree(building, ignore_errors=True)  # left by an attempt that was killed
        building.mkdir(parents=True)
        _write_config(building, config, tokenizer)
        with (building / "model.safetensors").open("wb") as file:
            _write_header(file, config)
            for values in _tensors(params, config, layout):
                file.write(values.tobytes())
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt, or of a shorter run that was gone on with
        building.rename(folder)
    else:
        for _ in _tensors(params, config, layout):
            pass
    wait_for_all("export")
    return folder


def _tensors(params: Params, config: TrainingConfig, layout: Layout) -> Iterator[np.ndarray[Any, Any]]:
    """Every tensor of the file in its order, gathered from all devices; collective."""
    gather = jax.jit(lambda weight, layer: weight[layer], out_shardings=layout.replicated)
    gather_whole = jax.jit(lambda weight: weight, out_shardings=layout.replicated)
    for tensor in _listing(config):
        weight = params
        for name in tensor.path:
            weight = weight[name]
        whole = gather_whole(weight) if tensor.layer is None else gather(weight, tensor.layer)
        values = np.asarray(whole.addressable_data(0)).reshape(tensor.shape)
        yield (values.T if tensor.transpose else values).astype(config.trainer.compute_dtype)


def _listing(config: TrainingConfig) -> list[HFTensor]:
    return list(FAMILIES[config.model.family].hf_tensors(config.model.shape))


def _write_header(file: BinaryIO, config: TrainingConfig) -> None:
    """The beginning of a safetensors file (https://github.com/huggingface/safetensors#format): its length as eight bytes, then JSON."""
    dtype = np.dtype(config.trainer.compute_dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in _listing(config):
        end = start + int(np.prod(tensor.shape)) * dtype.itemsize
        header[tensor.name] = {"dtype": _SAFETENSORS_TYPES[dtype.name], "shape": tensor.file_shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _write_config(folder: Path, config: TrainingConfig, tokenizer: Tokenizer) -> None:
    model = FAMILIES[config.model.family].hf_config(config.model.shape, config.trainer.compute_dtype, MAX_POSITIONS)
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    (folder / "config.json").write_text(json.dumps(model | ids, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(folder)
