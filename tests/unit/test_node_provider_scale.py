"""What one tick of the autoscaler costs our node provider when there are many slices."""

import time
from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from cluster.emulator.profile import INSTANT
from cluster.node_provider import REQUEST_LABEL, TYPE_LABEL
from tests.simulated_ray import Simulation, simulation

CONFIG = ClusterConfig(name="mine", project="my-project", zones=["us-central2-b"], accelerator_type="v4-32", max_slices=200)
TICK_CPU_S = 0.2


def seconds_of_a_tick(sim: Simulation) -> float:
    """CPU seconds of this process for what Ray asks of the provider in one tick: the listing, then tags, state and address of each node.
    The emulator's side of the calls, which run in this process too, is in it.
    """
    begun = time.process_time()
    names = sim.provider.non_terminated_nodes({})
    for name in names:
        sim.provider.node_tags(name)
        sim.provider.is_running(name)
        sim.provider.internal_ip(name)
    return time.process_time() - begun


def fill(sim: Simulation, slices: int) -> None:
    have = len(sim.provider._standing)
    names = [f"mine-x-{index}" for index in range(have, slices)]
    labels = {TYPE_LABEL: "v4-32", REQUEST_LABEL: "x"}
    metadata = {"startup-script": "#!/bin/bash\n" + "x" * 4096}
    for begin in range(0, len(names), 50):  # the rate of creations is kept
        sim.provider._slices.create_slices(names[begin : begin + 50], labels=labels, metadata=metadata)
        sim.world.clock.advance(120.0)
    sim.gcs.follow()
    sim.provider.non_terminated_nodes({})
    assert len(sim.provider._standing) == slices
    assert all(item.state == "READY" and len(item.hosts) == 4 for item in sim.provider._standing.values())


def test_a_tick_over_200_slices_of_4_hosts_is_cheap_and_grows_no_faster_than_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path))
    with simulation(CONFIG, tmp_path, profile=INSTANT) as sim:
        sim.gcs.boot_s = 0.0
        best = {}
        for slices in (50, 200):
            fill(sim, slices)
            assert len(sim.gcs.nodes) == slices * 4
            best[slices] = min(seconds_of_a_tick(sim) for _ in range(7))
    assert best[200] < TICK_CPU_S, best
    assert best[200] < 4 * 1.5 * best[50], best  # half as much again for what the clock of a busy machine adds
