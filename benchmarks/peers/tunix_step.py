"""The peer of tunix.py: Tunix's own training step of Gemma 3, compiled for a TPU slice that is not there. Prints one line of JSON.

Its model with its sharding, its PeftTrainer with its loss and its AdamW, bfloat16 weights and moments, as its command line for full
fine-tuning puts them together (tunix/cli/peft_main.py). Its default is to keep every activation; `--remat block` is what its larger
examples set.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tunix.models.gemma3 import model as gemma3
from tunix.sft import peft_trainer
from tunix.sft import utils as sft
from tunix.utils import sharding_utils

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launcher.training.compile_check import compile_lowered

SIZES = {
    "270m": gemma3.ModelConfig.gemma3_270m,
    "1b": gemma3.ModelConfig.gemma3_1b_pt,
    "4b": gemma3.ModelConfig.gemma3_4b_pt,
    "12b": gemma3.ModelConfig.gemma3_12b_pt,
    "27b": gemma3.ModelConfig.gemma3_27b_pt,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--topology", required=True, help="as libtpu calls it: v6e:4x4")
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--seq-len", type=int, required=True)
    parser.add_argument("--remat", choices=[policy.name.lower() for policy in gemma3.RematConfig], default="block")
    parser.add_argument("--quick", action="store_true", help="only as far as every buffer has its place")
    arguments = parser.parse_args()
    devices = topologies.get_topology_desc(arguments.topology, platform="tpu").devices
    # Its examples have a mesh of fsdp x tp; the largest part of fsdp needs the least memory
    arranged = mesh_utils.create_device_mesh((len(devices), 1), devices)
    mesh = Mesh(arranged, ("fsdp", "tp"), axis_types=(AxisType.Auto, AxisType.Auto))
    config = SIZES[arguments.size]()
    config.remat_config = gemma3.RematConfig[arguments.remat.upper()]
    begun = time.monotonic()
    with mesh:  # the old way to set a mesh, which is where it looks for it
        lowered = lower(config, mesh, arguments.batch_size, arguments.seq_len)
    lowering_seconds = time.monotonic() - begun
    done = compile_lowered(lowered, arguments.quick)
    done.lowering_seconds = lowering_seconds
    print(json.dumps(asdict(done)), flush=True)
    if arguments.quick:
        os._exit(0)  # the compiler is still at work


def lower(config: gemma3.ModelConfig, mesh: Mesh, batch_size: int, seq_len: int) -> Any:
    """PeftTrainer's jitted step with shapes for its arguments."""

    def shard(x: jax.Array, axes: tuple[str | None, ...], **_: Any) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

    sharding_utils.shard = shard  # Tunix's own does nothing where the first of this machine's devices is a CPU
    trainers = []

    def make() -> tuple[nnx.Module, nnx.Optimizer]:
        settings = peft_trainer.TrainingConfig(eval_every_n_steps=100)
        trainer = peft_trainer.PeftTrainer(gemma3.Gemma3(config, rngs=nnx.Rngs(0)), optax.adamw(1e-5), settings)
        trainers.append(trainer.with_gen_model_input_fn(model_input))
        return trainer.model, trainer.optimizer

    model, optimizer = nnx.eval_shape(make)
    place(model, mesh)
    place(optimizer, mesh)
    tokens = jax.ShapeDtypeStruct((batch_size, seq_len), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    mask = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_, sharding=tokens.sharding)
    step = nnx.jit(trainers[0].create_train_step_fn(), donate_argnames=("optimizer",))  # as in jit_train_and_eval_step
    return step.lower(model, optimizer, peft_trainer.TrainingInput(input_tokens=tokens, input_mask=mask))


def model_input(batch: peft_trainer.TrainingInput) -> dict[str, Any]:
    """As in peft_main.py."""
    seen = batch.input_tokens != 0
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": sft.build_positions_from_mask(seen),
        "attention_mask": sft.make_causal_attn_mask(seen),
    }


def place(module: nnx.Module, mesh: Mesh) -> None:
    """Give every shape the sharding that the model asks for."""
    state = nnx.state(module)
    specs = nnx.get_partition_spec(state)
    nnx.update(
        module,
        jax.tree.map(lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), state, specs),
    )


if __name__ == "__main__":
    main()
