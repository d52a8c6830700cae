"""Bytes of a chip and compile time of our training step beside those of Tunix, by the TPU's own compiler, for a slice that is not there.

    pip install -e ".[tpu]" "google-tunix>=0.1.7,<0.2"     # once, in a virtual environment of its own
    python benchmarks/tunix.py [--sizes 270m 4b] [--quick]

Both train all weights of the same Gemma 3 on the same batch (32 x 2,048 tokens) and the same slice (v6e-16), with the same JAX and the same
compiler, one after another in one run; no TPU is needed. Ours as `tpu train check` compiles it: float32 weights and moments, bfloat16
compute. Theirs as their trainer jits it (peers/tunix_step.py): bfloat16 weights and moments, fsdp over all chips, and `--remat`.

The last line is JSON. Bytes are those of the compiler's plan of a chip's memory, `analysis` those that `memory_analysis()` sums up, which
may count donated weights twice (launcher/training/compile_check.py). Compile time is what one waits for, so run it with nothing else on the
machine; `compile_cpu` are seconds of the processors, which other programs stretch less, and which a compiler that keeps both halves of a
core busy, as it does with ours, needs more of for the same work. `--quick` goes only as far as every
buffer has its place, and bytes alone are compared. Exit code 1 when a target is missed.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import ROOT, Failed, last_line, machine, ratio, run_benchmark, table
from benchmarks.tpu_compile import Point, measure
from launcher.check import ENVIRONMENT
from launcher.estimate.memory import GIB
from launcher.estimate.step import libtpu_topology

SLICE = "v6e-16"
SIZES = ("270m", "4b")
TARGETS = {"bytes": 0.5, "compile": 1 / 3}
LIMIT_S = 3600.0


@dataclass(frozen=True)
class Pair:
    """What the compiler said of both steps: the fields of `launcher.training.compile_check.Compilation`."""

    ours: Mapping[str, Any]
    theirs: Mapping[str, Any]

    @property
    def ratios(self) -> dict[str, float | None]:
        """Ours by theirs, of what was waited for."""
        fields = {"bytes": "total_bytes", "analysis": "analysis_bytes", "compile": "seconds", "compile_cpu": "cpu_seconds"}
        there = {name: field for name, field in fields.items() if name == "bytes" or self.whole}
        return {name: ratio(self.ours[field], self.theirs[field]) for name, field in there.items()}

    @property
    def whole(self) -> bool:
        """Whether both were compiled to their end."""
        return all(said["compiles"] for said in (self.ours, self.theirs))


def compile_both(size: str, remat: str, quick: bool) -> Pair:
    """Raises Failed when one of them does not compile, or does not fit."""
    point = Point(size, False, SLICE)
    ours = measure(point, quick)
    if not ours["good"]:
        raise Failed(f"{point.name}: {ours['compiler']['error'] or 'does not fit'}")
    return Pair(ours["compiler"], tunix(point, remat, quick))


def tunix(point: Point, remat: str, quick: bool) -> dict[str, Any]:
    """What the compiler says of Tunix's step. Raises Failed."""
    trainer, kind = point.config.trainer, point.config.slices.accelerator
    place = [f"--topology={libtpu_topology(kind)}", f"--batch-size={trainer.batch_size}", f"--seq-len={trainer.seq_len}"]
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "peers" / "tunix_step.py"),
        point.size,
        *place,
        f"--remat={remat}",
        *["--quick"] * quick,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"Tunix, {point.size}: not compiled within {LIMIT_S:.0f} s") from error
    if done.returncode != 0:
        raise Failed(f"Tunix, {point.size}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


TITLES = ("step", "GiB a chip", "args", "temps", "outputs", "compile s", "CPU s", "lowering s", "fused")


def show(pairs: Mapping[str, Pair]) -> str:
    lines = [
        (f"{size}, {name}", *_line(said))
        for size, pair in pairs.items()
        for name, said in (("podlaunch", pair.ours), ("Tunix", pair.theirs))
    ]
    return table(TITLES, lines)


def _line(said: Mapping[str, Any]) -> list[object]:
    sizes = [said[f"{kind}_bytes"] / GIB for kind in ("total", "arguments", "temporaries", "outputs")]
    times = [said[field] if said["compiles"] else None for field in ("seconds", "cpu_seconds", "lowering_seconds")]
    return [*sizes, *times, "yes" if said["fused_attention"] else "no"]


def verdict(pairs: Mapping[str, Pair], remat: str) -> dict[str, Any]:
    """The last line: every ratio, against the targets."""
    judged = [(f"{size} {what}", pair.ratios.get(what), most) for size, pair in pairs.items() for what, most in TARGETS.items()]
    return {
        "benchmark": "tunix",
        "slice": SLICE,
        "tunix_remat": remat,
        "ratios": {size: pair.ratios for size, pair in pairs.items()},
        "targets": TARGETS,
        "missed": [name for name, value, most in judged if value is not None and value > most],
        "not_compared": [name for name, value, _ in judged if value is None],
        "machine": machine(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--remat", choices=("none", "block", "decoder"), default="block", help="what Tunix computes again")
    parser.add_argument("--quick", action="store_true", help="bytes alone")
    arguments = parser.parse_args()
    if importlib.util.find_spec("tunix") is None:
        raise Failed('Tunix is not installed here: pip install -e ".[tpu]" "google-tunix>=0.1.7,<0.2"')
    pairs = {}
    for size in arguments.sizes:
        pairs[size] = compile_both(size, arguments.remat, arguments.quick)
        print(f"{size}: {pairs[size].ratios}", file=sys.stderr, flush=True)
    print(show(pairs))
    result = verdict(pairs, arguments.remat)
    print(last_line(result))
    return 0 if not result["missed"] else 1


if __name__ == "__main__":
    run_benchmark(main)
