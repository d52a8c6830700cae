"""`python -m tests.integration.mesh_worker JSON FILE`: ten steps of a tiny Gemma 3 on each of several meshes, in one process or several.

JSON maps a name to {"mesh": sizes of trainer.mesh, "devices": how many of all, "lora": rank, "fused": whether attention is the TPU's
kernel, interpreted, "model", "trainer": other settings}; process 0 writes a line of JSON for each: its name, and the loss and the norm of
the gradient of every step. What differs is the layout alone: the same rows, the same weights to begin with, the job's own step.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from launcher.config import TrainingConfig
from launcher.models.registry import VARIANTS
from launcher.training.child import Gang, connect, disconnect

STEPS = 10


def main() -> None:
    gang = Gang.from_environment()
    connect(gang)
    rows = []
    for name, layout in json.loads(sys.argv[1]).items():
        losses, norms = curve(**layout)
        rows.append({"name": name, "losses": losses, "grad_norms": norms})
    if gang.process == 0:  # to a file: gloo writes to stdout
        Path(sys.argv[2]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    disconnect(gang)
    os._exit(0)


def curve(
    mesh: dict[str, int],
    devices: int | None = None,
    *,
    lora: int = 0,
    fused: bool = False,
    model: Mapping[str, Any] = MappingProxyType({}),
    trainer: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[list[float], list[float]]:
    """(losses, norms of the gradients) of every step."""
    import jax

    from launcher.data.batches import TrainBatches
    from launcher.data.cache import open_packed
    from launcher.data.tokenizer import ByteTokenizer
    from launcher.models.attention import dense_attention
    from launcher.models.fused_attention import FusedAttention
    from launcher.training import mesh as mesh_module
    from launcher.training.mesh import make_layout
    from launcher.training.optimizer import make_optimizer
    from launcher.training.state import make_blueprint
    from launcher.training.step import lower_train_step, put_batch

    config = tiny_config(lora, model, {**trainer, "mesh": mesh})
    kernel = partial(FusedAttention, interpret=True) if fused else lambda *_args, **_axes: dense_attention
    setattr(mesh_module, "attention_for", kernel)  # noqa: B010  # what a mesh of TPUs would choose; not one of its exports
    found = jax.devices()[:devices]
    layout = make_layout(config.check_devices(len(found)), found)
    blueprint = make_blueprint(config, layout, make_optimizer(config))
    train = lower_train_step(blueprint).compile()
    batches = TrainBatches(open_packed(config.data, ByteTokenizer(), config.trainer.seq_len).train, config.trainer.batch_size, seed=0)
    state, frozen = spread(begun(config), blueprint.abstract), spread(beside(blueprint), blueprint.frozen)
    losses, norms = [], []
    for step in range(config.trainer.steps):
        state, metrics = train(frozen, state, put_batch(batches, step, layout))
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))
    return losses, norms


def tiny_config(lora: int, model: Mapping[str, Any], trainer: Mapping[str, Any]) -> TrainingConfig:
    """Heads that eight devices can share, keys that they cannot, and a window smaller than what a device has of a sequence, or not."""
    shape = {"layers": 2, "local_per_global": 1, "d_model": 128, "heads": 8, "kv_heads": 2, "head_dim": 8, "d_ff": 256, "window": 12}
    VARIANTS["tiny"] = dataclasses.replace(VARIANTS["gemma3-nano"], **{**shape, "query_scale": 8.0, **model})
    values = {
        "model": {"variant": "tiny", **({"weights": "/nowhere", "lora": {"rank": lora}} if lora else {})},
        "data": {"source": "python_stdlib", "max_bytes": 100_000},
        "trainer": {"steps": STEPS, "batch_size": 16, "seq_len": 64, "warmup_steps": 2, **trainer},
    }
    return TrainingConfig.from_dict(values)


def begun(config: TrainingConfig) -> Any:
    """The state that training begins with, in this process's memory; made on one device, once for all meshes."""
    import jax

    from launcher.mesh import MeshConfig
    from launcher.training.mesh import make_layout
    from launcher.training.optimizer import make_optimizer
    from launcher.training.state import make_blueprint

    key = repr(dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, mesh=MeshConfig())))
    if key not in _begun:
        layout = make_layout(MeshConfig().resolve(1), jax.local_devices()[:1])
        _begun[key] = jax.device_get(make_blueprint(config, layout, make_optimizer(config)).init())
    return _begun[key]


_begun: dict[str, Any] = {}


def beside(blueprint: Any) -> Any:
    """Random weights for adapters to stand beside, the same on every mesh; nothing without adapters."""
    import jax
    import numpy as np

    rng = np.random.default_rng(7)
    return jax.tree.map(lambda x: rng.normal(scale=0.1, size=x.shape).astype(x.dtype), blueprint.frozen)


def spread(values: Any, target: Any) -> Any:
    """On the devices, each with its part."""
    import jax

    return jax.tree.map(lambda x, like: jax.make_array_from_callback(like.shape, like.sharding, lambda at: x[at]), values, target)


if __name__ == "__main__":
    main()
