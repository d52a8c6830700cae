"""Days of bad luck under Ray's own autoscaler, in virtual time: nothing leaks, nothing sticks, nothing is made twice.

PODLAUNCH_CHAOS_SEEDS=N runs N seeds of 24 hours each at Ray's own pace; without it a few with longer ticks have to do.
"""

import os
import random
from pathlib import Path

import pytest

from cluster.autoscaler import node_type
from cluster.config import ClusterConfig
from tests.simulated_ray import simulation
from tests.storm import HOUR, Storm, Watch

CONFIG = ClusterConfig(
    name="mine",
    project="my-project",
    zones=["us-central2-b", "us-east5-a"],
    accelerator_type="v4-16",
    slices=2,
    max_slices=5,
    idle_minutes=10,
    provisioning="spot",
)
SEEDS = int(os.environ.get("PODLAUNCH_CHAOS_SEEDS", "0"))
DAYS = [(seed, 24.0, 5.0) for seed in range(1, SEEDS + 1)] or [(1, 24.0, 60.0), (2, 24.0, 60.0), (3, 3.0, 5.0)]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("seed", "hours", "tick_s"), DAYS)
def test_a_stormy_day_leaks_nothing_and_every_run_gets_its_slices(
    seed: int, hours: float, tick_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path))
    with simulation(CONFIG, tmp_path, seed=seed, tick_s=tick_s) as sim:
        storm = Storm(sim, random.Random(seed), node_type(CONFIG))
        watch = Watch(sim, CONFIG.effective_max_slices)
        end = sim.world.clock.now() + hours * HOUR
        while sim.world.clock.now() < end:
            storm.strike()
            sim.tick()
            watch.look()
        storm.calm()
        assert watch.made > hours / 2, "a day in which nothing happens shows nothing"
        assert sim.run(24 * HOUR, lambda: not sim.gcs.runs), [(run, sim.gcs.pending(run)) for run in sim.gcs.runs]
        assert sim.run(HOUR, lambda: not sim.everything() and not sim.instances()), (sim.everything(), sim.instances())
        assert sim.provider._orders.all() == []
