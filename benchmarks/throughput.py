"""Our training step beside that of transformers and torch, on the CPU: tokens a second, and CPU-seconds a step.

    python3 -m venv peer && peer/bin/pip install -q transformers torch --extra-index-url https://download.pytorch.org/whl/cpu   # once
    python benchmarks/throughput.py peer/bin/python [--rounds 3]

Gemma 3 270M from the same random weights and on the same random tokens, float32, AdamW with clipping, nothing computed twice, all
processors. Each round takes every contender once, in turn, in a process of its own (so that one model is in memory at a time), whose first
step, with start, loading and compilation, is told apart. Compilers keep their caches from one round to the next.

    podlaunch                       what a run's process does at each step
    transformers                    torch in eager mode, scaled-dot-product attention, fused AdamW
    transformers, torch.compile     model and loss compiled

The last line is JSON, in which a ratio is podlaunch's median by the peer's. There is no target: it is TPUs that the step is made for. Exit
code 1 when losses differ by more than 0.1 %, since the work is then not the same.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.measure import ROOT, Failed, last_line, machine, median, ratio, run_benchmark, table
from launcher.models.registry import VARIANTS

OURS, COMPILED = "podlaunch", "transformers, torch.compile"
WARM = 2
"""Steps of each contender in each round that are not timed."""
SAME_LOSS = 1e-3
"""Relative."""
LIMIT_S = 900.0
"""For one contender in one round."""


@dataclass(frozen=True)
class Work:
    """What every contender does."""

    variant: str
    remat: str = "none"
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


@dataclass
class Visit:
    """One contender in one round."""

    first: float
    """Seconds from the start of the process to the end of its first step."""
    seconds: float
    """Of all steps after the second, as the next."""
    cpu_seconds: float
    losses: list[float]
    """Of all steps, nats a token."""
    load: float = field(default_factory=lambda: os.getloadavg()[0])

    @property
    def steps(self) -> int:
        """That were timed."""
        return len(self.losses) - WARM


def commands(peer: Path, folder: Path, work: Work) -> dict[str, list[str]]:
    """Name of each contender -> what runs it."""
    arguments = [str(folder / "weights"), str(folder / "tokens.npy"), json.dumps(asdict(work))]
    torch = [str(peer), str(ROOT / "benchmarks" / "peers" / "torch_steps.py"), *arguments]
    return {
        OURS: [sys.executable, str(ROOT / "benchmarks" / "steps.py"), *arguments],
        "transformers": torch,
        COMPILED: [*torch, "--compile"],
    }


def visit(name: str, command: Sequence[str], folder: Path) -> Visit:
    """Raises Failed with what it said last."""
    own = {
        "JAX_PLATFORMS": "cpu",
        "PODLAUNCH_COMPILATION_CACHE": str(folder / "xla"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "HF_HUB_OFFLINE": "1",
    }
    began = time.time()
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **own},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{name} took more than {LIMIT_S:.0f} s") from error
    if done.returncode != 0:
        raise Failed(f"{name} ended with {done.returncode}: {' | '.join(done.stderr.splitlines()[-3:])}")
    told = json.loads(done.stdout.splitlines()[-1])
    return Visit(told.pop("first_done") - began, **told)


def write_tokens(path: Path, work: Work, steps: int, batch: int, length: int) -> None:
    """Of `steps` steps and those before them."""
    vocab = VARIANTS[work.variant].vocab
    np.save(path, np.random.default_rng(0).integers(0, vocab, (steps + WARM, batch, length + 1), dtype=np.int32))


def report(visits: Mapping[str, Sequence[Visit]], tokens: int) -> dict[str, Any]:
    """The result, and the table before it on stdout. `tokens`: of one step."""
    medians = {
        name: {
            "tokens_per_second": median([tokens * visit.steps / visit.seconds for visit in taken]),
            "cpu_seconds_per_step": median([visit.cpu_seconds / visit.steps for visit in taken]),
            "first_step_cold_s": taken[0].first,
            "first_step_s": median([visit.first for visit in taken[1:]]),
        }
        for name, taken in visits.items()
    }
    titles = ["median", "tokens/s", "CPU-s/step", "first step s", "the same, cached"]
    print(table(titles, [[name, *values.values()] for name, values in medians.items()]))
    peers = [name for name in medians if name != OURS]
    return {
        "benchmark": "throughput",
        "medians": medians,
        "cpu_ratio": {name: ratio(medians[OURS]["cpu_seconds_per_step"], medians[name]["cpu_seconds_per_step"]) for name in peers},
        "tokens_ratio": {name: ratio(medians[OURS]["tokens_per_second"], medians[name]["tokens_per_second"]) for name in peers},
        "loss_difference": loss_difference([visit for taken in visits.values() for visit in taken]),
        "raw": {name: [asdict(visit) for visit in taken] for name, taken in visits.items()},
        "machine": machine(),
    }


def loss_difference(visits: Sequence[Visit]) -> float:
    """The largest at any step, relative."""
    steps: Iterator[tuple[float, ...]] = zip(*(visit.losses for visit in visits), strict=True)
    return max(max(losses) / min(losses) - 1 for losses in steps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", type=Path, help="the interpreter of an environment with transformers and torch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="that are timed in each round")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--variant", default="gemma3-270m", help="of Gemma 3")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, which compiles for minutes")
    arguments = parser.parse_args()
    work, folder = Work(arguments.variant), Path(tempfile.mkdtemp(prefix="podlaunch-bench-"))
    contenders = commands(arguments.peer, folder, work)
    if arguments.eager:
        del contenders[COMPILED]
    visits: dict[str, list[Visit]] = {name: [] for name in contenders}
    try:
        write_tokens(folder / "tokens.npy", work, arguments.steps, arguments.batch, arguments.length)
        for number in range(arguments.rounds):
            # Ours is the first of all, since it writes the weights that the others begin with
            for name in list(contenders)[:: -1 if number % 2 else 1]:
                visits[name].append(taken := visit(name, contenders[name], folder))
                per_step = taken.cpu_seconds / taken.steps
                print(f"round {number + 1}, {name}: {per_step:.2f} CPU-s a step, load {taken.load:.1f}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = report(visits, arguments.batch * arguments.length)
    print(last_line({**result, "work": {**asdict(work), "batch": arguments.batch, "length": arguments.length}}))
    return 0 if result["loss_difference"] <= SAME_LOSS else 1


if __name__ == "__main__":
    run_benchmark(main)
