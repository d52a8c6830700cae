"""What benchmarks train: one small jitted step over all devices of all processes, with a gradient summed across them, and a checkpoint.

A script for job=script; recovery.py gives the same function to Ray Train. It tells of its steps in files of its own, whoever launched it:

    processes.jsonl     {process, pid, time}            once a process of the run knows where it is
    steps.jsonl         {step, pid, time}               process 0, after each step

Names no environment variable, so that a spare may import the libraries ahead.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

WIDTH, DEPTH, BATCH = 256, 8, 64
BALLAST_BYTES = 50 * 10**6
"""Of state that is sharded over all devices, on top of the weights: what a restart has to restore."""


def train(place: Path, steps: int, every: int, pause: float, told: Callable[[int], None] = lambda _: None) -> None:
    """From the newest checkpoint in `place` to step `steps`; a checkpoint at every multiple of `every`, complete before the next step.

    `pause`: seconds between two steps. Every process of the run calls it, after `jax.distributed.initialize`.
    """
    _tell(place / "processes.jsonl", process=jax.process_index())
    mesh = Mesh(np.array(jax.devices()), ("data",))
    replicated, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    shape = {
        "weights": jax.ShapeDtypeStruct((DEPTH, WIDTH, WIDTH), jnp.float32, sharding=replicated),
        "ballast": jax.ShapeDtypeStruct((BALLAST_BYTES // 4 // 1000 // 8 * 8, 1000), jnp.float32, sharding=split),
    }
    train_step = jax.jit(_step, donate_argnums=0)
    rows = np.random.default_rng(0).standard_normal((BATCH, WIDTH), np.float32)
    batch = jax.make_array_from_callback(rows.shape, split, rows.__getitem__)
    with ocp.CheckpointManager(place / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)) as checkpoints:
        first = checkpoints.latest_step() or 0
        if first:
            state = checkpoints.restore(first, args=ocp.args.StandardRestore(shape))
        else:
            state = {name: jax.make_array_from_callback(leaf.shape, leaf.sharding, _filler(leaf.shape)) for name, leaf in shape.items()}
        for step in range(first + 1, steps + 1):
            state = train_step(state, batch)
            jax.block_until_ready(state)
            if jax.process_index() == 0:
                _tell(place / "steps.jsonl", step=step)
            told(step)
            if step % every == 0:
                checkpoints.save(step, args=ocp.args.StandardSave(state))
                checkpoints.wait_until_finished()
            time.sleep(pause)  # the step is not what is measured


def _step(state: dict[str, Any], batch: jax.Array) -> dict[str, Any]:
    def loss(weights: jax.Array) -> jax.Array:
        out, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), batch, weights)
        return (out**2).mean()  # over all devices: its gradient is an all-reduce

    return {"weights": state["weights"] - 0.1 * jax.grad(loss)(state["weights"]), "ballast": state["ballast"] * 0.999}


def _filler(shape: tuple[int, ...]) -> Callable[[Any], np.ndarray]:
    return lambda index: np.full([len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True)], 0.01, np.float32)


def _tell(path: Path, **values: Any) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**values, "pid": os.getpid(), "time": time.time()}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("place", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--pause", type=float, default=0.05)
    arguments = parser.parse_args()
    from launcher.training import script

    script.initialize()
    train(arguments.place, arguments.steps, arguments.every, arguments.pause, told=lambda step: script.report(step, arguments.steps))


if __name__ == "__main__":
    main()
