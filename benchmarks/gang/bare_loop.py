"""One process of the loop that overhead.py compares with: the trainer's own compiled step on the trainer's own batches, and nothing else.

    python benchmarks/gang/bare_loop.py STEPS WARM [override ...]

Takes PODLAUNCH_COORDINATOR, PODLAUNCH_NUM_PROCESSES, PODLAUNCH_PROCESS_ID and PODLAUNCH_COMPILATION_CACHE as a training process of a run
does. Says when its first step is done. The last line is JSON: steps per second from step WARM to STEPS.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    steps, warm = int(sys.argv[1]), int(sys.argv[2])
    from launcher.training.child import Gang, connect

    connect(Gang.from_environment())
    import jax

    from launcher.compose import compose_config, load
    from launcher.data.batches import TrainBatches
    from launcher.data.cache import open_packed
    from launcher.data.tokenizer import ByteTokenizer
    from launcher.training.mesh import make_layout
    from launcher.training.optimizer import make_optimizer
    from launcher.training.state import make_blueprint
    from launcher.training.step import compile_steps, put_batch

    config = load(compose_config(sys.argv[3:])).training
    layout = make_layout(config.check_devices(len(jax.devices())))
    data = open_packed(config.data, ByteTokenizer(), config.trainer.seq_len)
    blueprint = make_blueprint(config, layout, make_optimizer(config))
    train = compile_steps(blueprint).with_frozen({}).train
    state = blueprint.init()
    batches = TrainBatches(data.train, config.trainer.batch_size, config.trainer.seed)
    began = 0.0
    for step in range(1, steps + 1):
        state, metrics = train(state, put_batch(batches, step - 1, layout))
        jax.block_until_ready((state, metrics))  # type: ignore[no-untyped-call]  # as the trainer does on CPUs
        if step == 1:
            print("step 1", flush=True)
        if step == warm:
            began = time.monotonic()
    print(json.dumps({"steps_per_second": (steps - warm) / (time.monotonic() - began)}), flush=True)


if __name__ == "__main__":
    main()
