"""The peer of recovery.py: the function of gang/train.py under Ray Train's JaxTrainer. The driver of a Ray job; writes driver.json, the
time of its call of fit().
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.jax import JaxTrainer

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false",  # steps that overlap deadlock on CPU devices; podlaunch sets the same
}


def loop(config: dict[str, Any]) -> None:
    sys.path.insert(0, config["code"])
    from train import train

    train(Path(config["place"]), config["steps"], config["every"], config["pause"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("place", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--pause", type=float, required=True)
    parser.add_argument("--hosts", type=int, required=True)
    parser.add_argument("--topology", required=True)
    parser.add_argument("--accelerator", required=True)
    parser.add_argument("--cache", help="folder of JAX's persistent compilation cache")
    arguments = parser.parse_args()
    cache = {}
    if arguments.cache:
        cache = {
            "JAX_COMPILATION_CACHE_DIR": arguments.cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    trainer = JaxTrainer(
        train_loop_per_worker=loop,
        train_loop_config={
            "code": str(Path(__file__).resolve().parents[1] / "gang"),
            "place": str(arguments.place),
            **{name: getattr(arguments, name) for name in ("steps", "every", "pause")},
        },
        scaling_config=ScalingConfig(
            use_tpu=True, num_workers=arguments.hosts, topology=arguments.topology, accelerator_type=arguments.accelerator
        ),
        run_config=RunConfig(
            name=arguments.place.name,
            storage_path=str(arguments.place / "ray"),
            failure_config=FailureConfig(max_failures=-1),
            worker_runtime_env={"env_vars": ENVIRONMENT | cache},
        ),
    )
    (arguments.place / "driver.json").write_text(json.dumps({"fit": time.time()}))
    trainer.fit()


if __name__ == "__main__":
    main()
