"""Compiles the fused attention kernel for a v6e-4 into the cache folder that is its first argument, as a run's process keeps its programs;
with the compiler's dumps when there is a second one, as `tpu train check` has them.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launcher.models.attention import Places
from launcher.models.fused_attention import FusedAttention
from launcher.training.compilation_cache import keep_in
from launcher.training.state import abstract_array

keep_in(sys.argv[1])
options: dict[str, Any] = {"xla_dump_to": sys.argv[2], "xla_dump_hlo_as_text": True} if len(sys.argv) > 2 else {}
devices: np.ndarray[Any, Any] = np.array(topologies.get_topology_desc("v6e:2x2", platform="tpu").devices)
attention = FusedAttention(Mesh(devices.reshape(4, 1, 1), ("rows", "heads", "length")), ("rows",), "heads", "length")
split = NamedSharding(attention.mesh, PartitionSpec("rows"))  # type: ignore[no-untyped-call]  # JAX's


def attend(x: jax.Array, positions: jax.Array) -> jax.Array:
    places = Places(positions, positions)
    return attention(x, x, x, queries_at=places, keys_at=places, is_global=jnp.array(False), window=None, scale=1.0, soft_cap=None)


x, positions = abstract_array((4, 128, 1, 128), jnp.bfloat16, split), abstract_array((4, 128), jnp.int32, split)
jax.jit(attend).lower(x, positions).compile(compiler_options=options)
