"""`tpu train check`: whether the training step compiles, fits, and how fast it can be, without a TPU."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.config import ClusterConfig
from launcher.check import Check
from launcher.check import check as check_run
from launcher.cli.options import CONSOLE
from launcher.config import LaunchConfig
from launcher.estimate.memory import GIB

EXIT_BAD = 1


Words = Annotated[list[str] | None, typer.Argument(metavar="[CONFIG] [key=value]...", help="A YAML file, and settings as for launch.py.")]


def check(
    words: Words = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
) -> None:
    """Compile the training step for the slices it would run on, without a TPU: does it compile, does it fit, how fast can it be?"""
    config = _config(list(words or []))
    if not as_json:
        _say(CONSOLE, f"compiling for {describe_slices(config.slices)}; minutes for a large model ...")
    found = check_run(config)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        report(found, CONSOLE)
    raise typer.Exit(0 if found.good else EXIT_BAD)


def _config(words: list[str]) -> LaunchConfig:
    from launcher.compose import compose_config, compose_file, load  # Hydra takes half a second to import

    if words and "=" not in words[0]:
        return compose_file(Path(words[0]), words[1:])
    return load(compose_config(words))


def describe_slices(cluster: ClusterConfig) -> str:
    kind = cluster.accelerator
    return f"{cluster.slices} x {kind.name} ({kind.topology}), {cluster.chips} chips"


def report(found: Check, console: Console) -> None:
    """What a person reads."""
    training, compiled = found.config.training_on_slices, found.compilation
    _say(
        console,
        f"{training.model.variant}, batch {training.trainer.batch_size} x {training.trainer.seq_len} tokens, remat {training.remat}, ",
    )
    _say(console, f"mesh {training.trainer.mesh.describe()}")
    _say(console, f"compiles    {'yes' if compiled.compiles else 'no'}, {compiled.seconds:.0f} s")
    if compiled.error is not None and compiled.fits is None:
        _say(console, f"            {compiled.error}")
    _say(console, f"fits        {_fits(found)}")
    if compiled.compiles:
        several = ", ".join(f"{count} {kind}" for kind, count in sorted(compiled.collectives.items()))
        _say(console, f"collectives {several or 'none'} (in the program; a loop's body counts once)")
        _say(console, f"attention   {'the fused kernel' if compiled.fused_attention else 'plain XLA: no fused kernel in the program'}")
    console.print(_memory(found))
    for line in _speed(found):
        _say(console, line)


def _fits(found: Check) -> str:
    compiled, hbm = found.compilation, found.config.slices.accelerator.hbm_gib
    if compiled.total_bytes is not None:
        return f"yes, {compiled.total_bytes / GIB:.2f} of {hbm:g} GiB a chip"
    if compiled.needed_bytes is not None and compiled.available_bytes is not None:
        return f"no, {compiled.needed_bytes / GIB:.2f} GiB of {compiled.available_bytes / GIB:.2f} GiB a chip"
    return "unknown"


def _memory(found: Check) -> Table:
    compiled = found.compilation
    table = Table("GiB A CHIP", box=None)
    table.add_column("COMPILER", justify="right")
    table.add_column("ESTIMATE", justify="right")
    table.add_row("total", _gib(compiled.total_bytes or compiled.needed_bytes), _gib(found.estimate.memory.total))
    for kind in ("arguments", "temporaries", "outputs", "code"):
        table.add_row(f"  {kind}", _gib(getattr(compiled, f"{kind}_bytes")), "")
    for kind, size in found.estimate.memory.by_kind().items():
        table.add_row(f"  {kind.replace('_', ' ')}", "", _gib(size))
    return table


def _gib(size: float | None) -> str:
    return "?" if size is None else f"{size / GIB:.3f}"


def _speed(found: Check) -> list[str]:
    time = found.estimate.time
    usd = time.usd_per_billion_tokens
    return [
        "estimates at the chips' peaks, which no step reaches:",
        f"time        at least {time.step_s * 1000:.1f} ms, bound by {time.bound} (compute {time.compute_s * 1000:.1f}, "
        f"HBM {time.hbm_s * 1000:.1f}, ICI {time.ici_s * 1000:.1f}, DCN {time.dcn_s * 1000:.1f})",
        f"tokens/s    at most {time.tokens_per_second:,.0f}, MFU at most {time.mfu:.0%}",
        f"price       {'unknown' if usd is None else f'at least ${usd:.2f} a billion tokens at list price'}",
    ]


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
