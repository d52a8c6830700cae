"""A training script of your own: Flax NNX, data-parallel over all devices of all hosts, checkpoints by Orbax.

    python examples/train_nnx.py --steps 100
    python launch.py job=script run.code=examples job.entrypoint="train_nnx.py --steps 100"

The second command runs the same file on every host of a slice. Killed or preempted, it goes on from its last checkpoint, and ends with
the same losses and parameters as if nothing had happened: batch and state depend on the step alone.
"""

import argparse
import hashlib

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launcher.training import script


class Network(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(1, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.last = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.relu(self.second(nnx.relu(self.first(x)))))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--checkpoint-every", type=int, default=20)
    parser.add_argument("--log-every", type=int, default=10)
    args = parser.parse_args()

    script.initialize()
    mesh = Mesh(np.array(jax.devices()), ("data",))
    replicated, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))

    def build() -> tuple[Network, nnx.Optimizer[Network]]:
        network = Network(args.width, nnx.Rngs(0))
        return network, nnx.Optimizer(network, optax.adamw(args.lr), wrt=nnx.Param)

    graph, _ = nnx.split(nnx.eval_shape(build))
    state = jax.jit(lambda: nnx.state(build()), out_shardings=replicated)()

    @jax.jit
    def train_step(state: nnx.State, x: jax.Array, y: jax.Array) -> tuple[nnx.State, jax.Array]:
        network, optimizer = nnx.merge(graph, state)
        loss, gradients = nnx.value_and_grad(lambda network: ((network(x) - y) ** 2).mean())(network)
        optimizer.update(network, gradients)
        return nnx.state((network, optimizer)), loss

    def batch(step: int) -> tuple[jax.Array, jax.Array]:
        x = np.random.default_rng(step).uniform(-6, 6, (args.batch_size, 1)).astype(np.float32)
        x, y = (jax.make_array_from_callback(part.shape, split, part.__getitem__) for part in (x, np.sin(x)))
        return x, y

    options = ocp.CheckpointManagerOptions(save_interval_steps=args.checkpoint_every, max_to_keep=2)
    with ocp.CheckpointManager(script.checkpoint_dir(), options=options) as checkpoints:
        first = checkpoints.latest_step() or 0
        if first:
            state = checkpoints.restore(first, args=ocp.args.StandardRestore(state))
            print(f"restored step {first}")
        for step in range(first + 1, args.steps + 1):
            state, loss = train_step(state, *batch(step))
            checkpoints.save(step, args=ocp.args.StandardSave(state))  # does so only when it is due
            metrics = {"loss": loss} if step % args.log_every == 0 or step == args.steps else {}
            script.report(step, args.steps, **metrics)
            if script.preempted():
                if checkpoints.latest_step() != step:
                    checkpoints.save(step, args=ocp.args.StandardSave(state), force=True)
                print(f"told to end: saved step {step}")
                return

    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    print(f"parameters and optimizer state: sha256 {digest.hexdigest()[:16]}")


if __name__ == "__main__":
    main()
