"""What the TPU's own compiler says of our training step: every size of Gemma 3, on slices that are not there.

    python benchmarks/tpu_compile.py --list
    python benchmarks/tpu_compile.py [--only 270m 4b-lora-v6e ...] [--results FILE] [--quick]

Needs the extra `tpu`, and no TPU. A point is one size, full or LoRA, on the smallest slice of a generation that the estimate says it fits;
batch 32 x 2,048 tokens, bfloat16 over float32 weights and moments (`experiment=bf16`). Each is compiled as `tpu train check` does, one
at a time, minutes each. What is known is kept in FILE, a line a point, so that an interrupted run goes on where it was. `--only` takes the
points whose names begin with one of the words.

`--quick` goes only as far as every buffer has its place on the chip, which takes seconds: bytes, collectives and the kernel are known then,
and whether it fits; that machine code can be made of it is not. A point that was compiled to the end stays so.

The last line is JSON. Exit code 1 when a point that was asked for does not compile or fit, lacks the fused kernel, or misses a target.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import Failed, Lines, last_line, machine, ratio, run_benchmark, table
from cluster.errors import ConfigError, PodlaunchError
from cluster.tpu.catalog import all_types
from launcher.check import check
from launcher.compose import compose_config, load
from launcher.config import LaunchConfig
from launcher.estimate.memory import GIB
from launcher.estimate.run import ERROR, estimate_of

SIZES = ("270m", "1b", "4b", "12b", "27b")
GENERATIONS = ("v6e", "v5e", "v5p")
HOST = 4
"""Chips of the smallest slice that is taken."""
LORA_RANK = 16
SIDE_BY_SIDE = {"270m": "v6e-16", "4b": "v6e-16"}
"""Compiled for this slice as well, full and LoRA: the one that other trainers' figures are known for."""
TWO_SLICES = ("270m", "v6e-8")
LIMIT_S = 3600.0


@dataclass(frozen=True)
class Point:
    """One thing to compile."""

    size: str
    lora: bool
    accelerator_type: str
    slices: int = 1

    @property
    def name(self) -> str:
        several = f"-x{self.slices}" if self.slices > 1 else ""
        return f"{self.size}-{'lora' if self.lora else 'full'}-{self.accelerator_type}{several}"

    @property
    def config(self) -> LaunchConfig:
        """Raises ConfigError when the step cannot fit."""
        return load(compose_config(overrides(self)))


def named(name: str) -> Point:
    """The point that is called so."""
    size, kind, slices = name.split("-", 2)
    accelerator_type, _, several = slices.partition("-x")
    return Point(size, kind == "lora", accelerator_type, int(several or 1))


def overrides(point: Point) -> list[str]:
    """The settings of a launch, as on the command line."""
    profile = "v5e" if point.accelerator_type.startswith("v5litepod") else point.accelerator_type.partition("-")[0]
    weights = ["model.weights=hf://google/any", f"model.lora.rank={LORA_RANK}"] if point.lora else []
    return [
        f"cluster={profile}",
        f"cluster.accelerator_type={point.accelerator_type}",
        f"cluster.slices={point.slices}",
        f"cluster.max_slices={point.slices}",
        f"model.variant=gemma3-{point.size}",
        "experiment=bf16",
        *weights,
    ]


def points(only: tuple[str, ...] = ("",)) -> Iterator[Point]:
    """All whose names begin with one of `only`, those that matter most first."""
    return (point for point in _all_points(only) if point.name.startswith(only))


def _all_points(only: tuple[str, ...]) -> Iterator[Point]:
    """Looks for the smallest slice only of what may be wanted, since that takes a second each."""
    for size, accelerator_type in SIDE_BY_SIDE.items():
        for lora in (False, True):
            yield Point(size, lora, accelerator_type)
    size, accelerator_type = TWO_SLICES
    yield Point(size, False, accelerator_type, slices=2)
    done = {(size, lora, name) for size, name in SIDE_BY_SIDE.items() for lora in (False, True)}
    for size in SIZES:
        for generation in GENERATIONS:
            for lora in (False, True):
                begin = f"{size}-{'lora' if lora else 'full'}-"
                if not any(word.startswith(begin) or begin.startswith(word) for word in only):
                    continue
                smallest = smallest_slice(size, lora, generation)
                if (size, lora, smallest) not in done:
                    yield Point(size, lora, smallest)


def smallest_slice(size: str, lora: bool, generation: str) -> str:
    """The smallest accelerator type that the step fits by the estimate, however far that is off."""
    for kind in (kind for kind in all_types() if kind.generation == generation and kind.chips >= HOST):
        try:
            estimate = estimate_of(Point(size, lora, kind.name).config)
        except ConfigError:
            continue
        if estimate.memory.total * (1 + ERROR) <= kind.hbm_gib * GIB:
            return kind.name
    raise Failed(f"{size} fits no slice of {generation}")


def measure(point: Point, quick: bool = False) -> dict[str, Any]:
    """What the compiler and the estimate say. Raises Failed when the compiler breaks down."""
    try:
        return check(point.config, LIMIT_S, quick=quick).to_dict()
    except PodlaunchError as error:
        raise Failed(f"{point.name}: {error}") from error


def fill(wanted: Sequence[Point], results: Path, quick: bool = False) -> dict[str, dict[str, Any]]:
    """Compile what `results` does not have yet, and keep each as soon as it is there. Point's name -> what is known, the estimate anew."""
    known = {row["point"]: row for row in Lines(results).all()}
    for point in wanted:
        if point.name in known and (quick or known[point.name]["compiler"]["compiles"] is not None):
            known[point.name]["estimated"]["bytes"] = estimated(point)
            continue
        print(f"compiling {point.name} ...", file=sys.stderr, flush=True)
        begun = time.monotonic()
        row = {"point": point.name, **measure(point, quick), "machine": machine()}
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        known[point.name] = row
        print(f"          {point.name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return {point.name: known[point.name] for point in wanted if point.name in known}


def estimated(point: Point) -> dict[str, float]:
    memory = estimate_of(point.config).memory
    return memory.by_kind() | {"total": memory.total}


TITLES = (
    *("point", "mesh", "fits", "compiles", "GiB", "args", "temps", "estimate", "ratio", "fused", "s", "CPU s", "collectives"),
    *("~ms", "~bound", "~tokens/s", "~MFU"),
)
"""Of the table; ~ marks what is a roofline's estimate, at best."""


def show(found: Mapping[str, Mapping[str, Any]]) -> str:
    return table(TITLES, [_line(name, row) for name, row in found.items()])


def _line(name: str, row: Mapping[str, Any]) -> list[object]:
    compiler, estimated = row["compiler"], row["estimated"]
    sizes = [_gib(compiler.get(f"{kind}_bytes")) for kind in ("total", "arguments", "temporaries")]
    if sizes[0] is None:
        sizes[0] = _gib(compiler.get("needed_bytes"))
    mesh = " ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
    collectives = " ".join(f"{_SHORT.get(kind, kind)} {count}" for kind, count in sorted(compiler["collectives"].items()))
    return [
        name,
        mesh or "-",
        "yes" if compiler["fits"] else "NO",
        {True: "yes", False: "NO", None: "-"}[compiler["compiles"]],
        *sizes,
        _gib(estimated["bytes"]["total"]),
        estimate_ratio(row),
        "yes" if compiler["fused_attention"] else "no",
        *([round(compiler["seconds"]), round(compiler["cpu_seconds"])] if compiler["compiles"] else [None, None]),
        collectives or "none",
        estimated["step_seconds_at_least"] * 1000,
        estimated["bound_by"],
        f"{estimated['tokens_per_second_at_most']:,.0f}",
        estimated["mfu_at_most"],
    ]


_SHORT = {"all-gather": "gather", "all-reduce": "reduce", "reduce-scatter": "scatter", "collective-permute": "permute"}


def _gib(size: float | None) -> float | None:
    return None if size is None else size / GIB


def estimate_ratio(row: Mapping[str, Any]) -> float | None:
    """The estimate by the compiler's bytes; without the code of a program that has none yet."""
    compiler, estimated = row["compiler"], row["estimated"]["bytes"]
    code = 0.0 if compiler["compiles"] else estimated["program"]
    return ratio(estimated["total"] - code, compiler.get("total_bytes") or compiler.get("needed_bytes"))


def verdict(found: Mapping[str, Mapping[str, Any]], wanted: Sequence[Point]) -> dict[str, Any]:
    """The last line: what was found, against the targets."""
    ratios = {name: estimate_ratio(row) for name, row in found.items()}
    return {
        "benchmark": "tpu_compile",
        "compiled": sum(row["compiler"]["compiles"] is True for row in found.values()),
        "only_placed": sorted(name for name, row in found.items() if row["compiler"]["compiles"] is None),
        "bad": sorted(name for name, row in found.items() if not (row["good"] and row["compiler"]["fused_attention"])),
        "not_run": [point.name for point in wanted if point.name not in found],
        "estimate_ratios": ratios,
        "estimate_off": sorted(name for name, value in ratios.items() if value is None or abs(value - 1) > ERROR),
        "estimate_target": ERROR,
        "machine": machine(),
    }


def met(result: Mapping[str, Any]) -> bool:
    return not (result["bad"] or result["estimate_off"] or result["not_run"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="POINT", help="points whose names begin so")
    parser.add_argument("--results", type=Path, default=Path("tpu-compile.jsonl"), help="what is known, a line a point")
    parser.add_argument("--quick", action="store_true", help="only as far as every buffer has its place")
    parser.add_argument("--table", action="store_true", help="only show what is known")
    parser.add_argument("--list", action="store_true", help="name the points and end")
    arguments = parser.parse_args()
    if arguments.table:
        known = {row["point"]: row for row in Lines(arguments.results).all() if row["point"].startswith(tuple(arguments.only))}
        wanted = [named(name) for name in known]
    else:
        wanted = list(points(tuple(arguments.only)))
    if not wanted:
        raise Failed(f"no point begins with {' or '.join(arguments.only)}; --list names them")
    if arguments.list:
        print("\n".join(point.name for point in wanted))
        return 0
    found = fill(wanted, arguments.results, arguments.quick or arguments.table)
    print(show(found))
    result = verdict(found, wanted)
    print(last_line(result))
    return 0 if met(result) else 1


if __name__ == "__main__":
    run_benchmark(main)
