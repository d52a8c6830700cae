"""`tpu types`: the accelerator types that slices can be made of."""

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from cluster.tpu.catalog import PRICES_AS_OF, AcceleratorType, all_types, check_generation, topologies_of
from launcher.cli.options import CONSOLE, ERRORS


def types(
    generation: Annotated[str | None, typer.Option("--generation", "-g", help="Only this one: v2, v3, v4, v5e, v5p or v6e.")] = None,
    chips: Annotated[int | None, typer.Option(min=1, help="Only types with exactly so many chips.")] = None,
    min_chips: Annotated[int | None, typer.Option(min=1, help="Only types with at least so many chips.")] = None,
    max_chips: Annotated[int | None, typer.Option(min=1, help="Only types with at most so many chips.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
) -> None:
    """List accelerator types with topology, hosts, memory, peak and list price."""
    wanted = None if generation is None else check_generation(generation)
    low = chips or min_chips or 1
    high = chips or max_chips
    found = [
        kind for kind in all_types() if wanted in (None, kind.generation) and kind.chips >= low and (high is None or kind.chips <= high)
    ]
    if as_json:
        print(json.dumps([_row(kind) for kind in found], indent=1))
        return
    if not found:
        CONSOLE.print("no accelerator type is like that; `tpu types` without options lists all", highlight=False)
        return
    CONSOLE.print(_table(found))
    ERRORS.print(f"Prices: {PRICES_AS_OF}.", highlight=False, soft_wrap=True)


def _row(kind: AcceleratorType) -> dict[str, Any]:
    return {
        "name": kind.name,
        "generation": kind.generation,
        "topology": kind.topology,
        "topologies": topologies_of(kind.name),
        "chips": kind.chips,
        "hosts": kind.hosts,
        "chips_per_host": kind.chips_per_host,
        "runtime_version": kind.runtime_version,
        "peak_bf16_tflops_per_chip": kind.peak_bf16_tflops,
        "hbm_gib_per_chip": kind.hbm_gib,
        "usd_per_hour": _hourly(kind.usd_per_chip_hour, kind),
        "usd_per_hour_spot": _hourly(kind.usd_per_chip_hour_spot, kind),
        "prices_as_of": PRICES_AS_OF,
    }


def _hourly(per_chip: float | None, kind: AcceleratorType) -> float | None:
    return None if per_chip is None else round(per_chip * kind.chips, 2)


def _table(kinds: list[AcceleratorType]) -> Table:
    table = Table("TYPE", "TOPOLOGY", box=None)
    for title in ("CHIPS", "HOSTS", "HBM GiB", "PEAK TFLOP/s", "$/h", "$/h SPOT"):
        table.add_column(title, justify="right")
    table.add_column("RUNTIME VERSION")
    for kind in kinds:
        others = len(topologies_of(kind.name)) - 1
        prices = (_hourly(kind.usd_per_chip_hour, kind), _hourly(kind.usd_per_chip_hour_spot, kind))
        table.add_row(
            kind.name,
            f"{kind.topology} (+{others})" if others else kind.topology,
            str(kind.chips),
            str(kind.hosts),
            f"{kind.chips * kind.hbm_gib:g}",
            f"{kind.chips * kind.peak_bf16_tflops:g}",
            *("?" if price is None else f"{price:.2f}" for price in prices),
            kind.runtime_version,
        )
    return table
