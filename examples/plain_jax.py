"""A script that knows nothing of its launcher: plain JAX on all devices of all hosts.

python launch.py job=script run.code=examples job.entrypoint="plain_jax.py --name 'two words'"
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", default="world")
    args = parser.parse_args()

    jax.distributed.initialize()
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    ones = jax.jit(lambda: jnp.ones(jax.device_count()), out_shardings=NamedSharding(mesh, PartitionSpec("devices")))()
    total = int(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(ones))
    print(f"hello {args.name}: process {jax.process_index()} of {jax.process_count()}, sum over all devices {total}")


if __name__ == "__main__":
    main()
