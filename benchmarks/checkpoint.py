"""What checkpoints cost the default local run: for how long training stands still, of all the time it trains.

    python benchmarks/checkpoint.py [--steps 120] [override ...]        e.g. trainer.checkpoint_every=auto

One process with as many CPU devices as the default cluster has chips, the default model, data and interval. The last line is JSON.
The first save is told apart: it also pays for what Orbax loads once.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TARGET = 0.01
"""Of wall time."""


class Times:
    """Takes the job's events and remembers when phases began."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self.saves: list[dict[str, Any]] = []

    def emit(self, event: str, **values: Any) -> None:
        if event == "phase":
            self.phases.setdefault(values["phase"], time.monotonic())
        elif event == "checkpoint":
            self.saves.append(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from launcher.compose import compose_config, load

    config = load(compose_config([f"trainer.steps={arguments.steps}", *arguments.overrides]))
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={config.cluster.chips}"
    from launcher.training.job import TrainingJob

    times = Times()
    with tempfile.TemporaryDirectory() as folder:
        TrainingJob(config.training, Path(folder), times).run()
    report(times, config.trainer.steps, str(config.trainer.checkpoint_every))


def report(times: Times, steps: int, every: str) -> None:
    wall = times.phases["saving"] - times.phases["training"]
    inside = [save for save in times.saves if save["step"] < steps]  # the last one is after the loop
    blocking = [save["blocking_s"] for save in inside]
    later = sorted(blocking[1:]) or blocking
    share = sum(blocking) / wall
    for save in inside:
        print(f"step {save['step']:>6}: blocked {save['blocking_s'] * 1000:7.1f} ms, written after {save['write_s'] * 1000:7.1f} ms")
    print(f"{steps} steps in {wall:.2f} s, checkpoint every {every}: training stood still {share:.2%} of it (target {TARGET:.0%})")
    result = {
        "benchmark": "checkpoint",
        "steps": steps,
        "checkpoint_every": every,
        "saves": len(inside),
        "wall_s": round(wall, 3),
        "step_s": round(wall / steps, 4),
        "blocking_first_s": blocking[0] if blocking else None,
        "blocking_median_later_s": later[len(later) // 2] if later else None,
        "write_mean_s": round(sum(save["write_s"] for save in inside) / max(1, len(inside)), 4),
        "blocking_share": round(share, 5),
        "target_share": TARGET,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
