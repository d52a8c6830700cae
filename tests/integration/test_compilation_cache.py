"""What a process has compiled once is there when it is started again, whichever process of the run it is. Two real ones."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT

pytestmark = pytest.mark.timeout(400)

PROGRAM = """
import json, os, sys
from collections import Counter
from launcher.training.child import Gang, connect
connect(Gang.from_environment())
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

events = Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
shards = NamedSharding(Mesh(np.array(jax.devices()), ("devices",)), PartitionSpec("devices"))
ones = jax.make_array_from_callback((8, 4), shards, lambda index: np.ones((8, 4), np.float32)[index])
total = jax.jit(lambda x: jnp.tanh(x @ x.T).sum())(ones)
print(json.dumps([float(total), events["compile_requests_use_cache"], events["cache_hits"]]))
"""


def results(cache: Path) -> list[list[float]]:
    """What each of two processes computed, how many programs it needed, and how many of them it did not have to compile."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PODLAUNCH_COMPILATION_CACHE": str(cache),
        "PODLAUNCH_COORDINATOR": f"127.0.0.1:{port}",
        "PODLAUNCH_NUM_PROCESSES": "2",
    }
    command = [sys.executable, "-c", PROGRAM]
    processes = [
        subprocess.Popen(command, env={**env, "PODLAUNCH_PROCESS_ID": str(index)}, cwd=ROOT, stdout=subprocess.PIPE) for index in range(2)
    ]
    try:
        return [json.loads(process.communicate(timeout=150)[0].splitlines()[-1]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_every_process_finds_at_its_next_start_what_it_has_compiled(tmp_path: Path) -> None:
    first, second = results(tmp_path), results(tmp_path)
    assert [(result[0], result[2]) for result in first] == [(first[0][0], 0)] * 2
    assert [result[1] for result in first] == [first[0][1]] * 2
    assert first[0][1] > 0
    assert second == [[total, programs, programs] for total, programs, _ in first]
