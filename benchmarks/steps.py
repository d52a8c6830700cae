"""Our training step, some times, in this process: one visit of throughput.py.

    python benchmarks/steps.py WEIGHTS TOKENS REQUEST

REQUEST is the JSON of throughput.py's `Work`. Writes the weights it begins with as a Hugging Face folder to WEIGHTS where there is none;
TOKENS is a file of NumPy's, int32 [steps, batch, length + 1]. The last line is JSON: when the first step was done (seconds since the
epoch), seconds and CPU-seconds of all after the second, and the loss of each.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    weights, tokens, work = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    from launcher.training.child import Gang, connect

    connect(Gang(None, 1, 0))
    import jax
    import numpy as np

    from launcher.config import TrainingConfig
    from launcher.data.tokenizer import ByteTokenizer
    from launcher.training.export import export_model
    from launcher.training.mesh import make_layout
    from launcher.training.optimizer import make_optimizer
    from launcher.training.state import make_blueprint
    from launcher.training.step import lower_train_step

    batches = np.load(tokens)
    config = TrainingConfig.from_dict(settings(work, batches.shape))
    layout = make_layout(config.check_devices(len(jax.devices())))
    blueprint = make_blueprint(config, layout, make_optimizer(config))
    train = lower_train_step(blueprint).compile()
    state = blueprint.init()
    if not weights.exists():
        export_model(state.params, config, ByteTokenizer(), weights, layout)
    losses: list[float] = []

    def step(batch: Any) -> None:
        nonlocal state
        arrays = {
            "tokens": batch[:, :-1],
            "targets": batch[:, 1:],
            "positions": np.broadcast_to(np.arange(batch.shape[1] - 1, dtype=np.int32), batch[:, 1:].shape),
            "segment_ids": np.ones_like(batch[:, 1:]),
            "weights": np.ones(batch[:, 1:].shape, np.float32),
        }
        state, metrics = train({}, state, jax.device_put(arrays, layout.batch))
        jax.block_until_ready((state, metrics))  # type: ignore[no-untyped-call]  # as the trainer does on CPUs
        losses.append(float(metrics.loss))

    step(batches[0])
    first_done = time.time()
    step(batches[1])  # torch may compile something again
    began, cpu = time.monotonic(), time.process_time()
    for batch in batches[2:]:
        step(batch)
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu
    print(json.dumps({"first_done": first_done, "seconds": seconds, "cpu_seconds": cpu_seconds, "losses": losses}))


def settings(work: dict[str, Any], shape: tuple[int, int, int]) -> dict[str, Any]:
    """Of a training that does what the peer does: the same optimizer at a constant rate, and nothing computed twice."""
    steps, batch, length = shape
    trainer = {"steps": steps, "batch_size": batch, "seq_len": length - 1, "compute_dtype": "float32", "remat": work["remat"]}
    optimizer = {name: work[name] for name in ("lr", "beta1", "beta2", "epsilon", "weight_decay", "max_grad_norm")}
    return {
        "model": {"variant": work["variant"]},
        "data": {"source": "python_stdlib"},  # whose tokens are not read
        "trainer": {**trainer, **optimizer, "optimizer": "adamw", "no_decay": ["norm"], "schedule": "constant", "warmup_steps": 0},
    }


if __name__ == "__main__":
    main()
