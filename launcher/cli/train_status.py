"""`tpu train status`: all runs in a table, or one with everything that its directory says of it."""

import itertools
import json
import math
import time
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.table import Column, Table

from cluster.errors import ConfigError
from launcher.cli.options import CONSOLE, DEFAULT_ROOT, Root, locate_run, storage_endpoint
from launcher.cli.status import watch_console
from launcher.follow import loss_text, print_summary, step_text, table_console
from launcher.runs import RunDirectory, RunStatus, list_runs

WIDTH = 40
"""Of bars and curves, in characters."""
_HEIGHTS = "▁▂▃▄▅▆▇█"


def status(
    run: Annotated[str | None, typer.Argument(help="One run; without it, a table of all.")] = None,
    root: Root = DEFAULT_ROOT,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again and again until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks, with --watch.")] = 2.0,
) -> None:
    """Show runs."""
    if as_json and watch:
        raise ConfigError("--json and --watch do not go together: call `tpu train status --json` as often as you like")

    def show() -> None:
        directories = [locate_run(run, root)] if run is not None else list_runs(root, storage_endpoint(root))
        found = [(directory, status) for directory in directories if (status := directory.status()) is not None]
        if as_json:
            rows = [status.to_dict() for _, status in found]
            print(json.dumps(rows[0] if run is not None and rows else rows, indent=1))
        elif run is None:
            table_console().print(_table([status for _, status in found]))
        else:
            for directory, status in found:
                _show_one(directory, status)

    if watch:
        watch_console(show, interval)
    else:
        show()


def _table(runs: Sequence[RunStatus]) -> Table:
    table = Table(Column("RUN", overflow="fold"), "STATUS", "STEP", "LOSS", "RECOVERIES", "GOODPUT", "COST", "DURATION", box=None)
    for one in runs:
        minutes = ((one.ended_at or one.updated_at) - one.started_at) / 60
        goodput = "" if one.goodput is None else f"{one.goodput:.0%}"
        cost = "" if one.cost_usd is None else f"${one.cost_usd:.2f}"
        table.add_row(one.run_id, one.state, step_text(one), loss_text(one), str(one.recoveries.total), goodput, cost, f"{minutes:.1f} min")
    return table


def _show_one(run: RunDirectory, status: RunStatus) -> None:
    def line(title: str, text: str) -> None:
        CONSOLE.print(f"{title:<12}{text}", highlight=False, soft_wrap=True, markup=False)

    line("run", f"{status.run_id} on cluster {status.cluster}, attempt {status.attempt}" + (f", {status.phase}" if status.phase else ""))
    if status.total_steps:
        line("progress", f"{bar(status.step / status.total_steps)} {status.step}/{status.total_steps}")
    curve = losses(run)
    if len(curve) > 1:
        values = [curve[step] for step in sorted(curve)]
        line("loss", f"{sparkline(values)} {values[0]:.4f} to {values[-1]:.4f}")
    if status.tokens_per_second:
        line("speed", f"{status.tokens_per_second:,.0f} tokens/s" + (f", MFU {status.mfu:.1%}" if status.mfu else ""))
    if status.slices:
        line("hosts", f"{status.hosts} on {', '.join(status.slices)}")
    for event in run.events():
        if event["event"] == "failure":
            when = time.strftime("%H:%M:%S", time.localtime(event["time"]))
            place = f"attempt {event['attempt']} at step {event['step']} on {event['host']} ({event['cause']})"
            line("failure", f"{when} {place}: {event['error']}")
    if status.goodput is not None:
        line("goodput", f"{bar(status.goodput)} {status.goodput:.1%}")
    print_summary(run, status, CONSOLE)


def losses(run: RunDirectory) -> dict[int, float]:
    """By step; of a step that was done again, the later one."""
    return {row["step"]: row["loss"] for row in run.metrics() if row.get("loss") is not None}


def bar(share: float) -> str:
    """`share` from 0 to 1."""
    full = round(min(max(share, 0.0), 1.0) * WIDTH)
    return "█" * full + "░" * (WIDTH - full)


def sparkline(values: Sequence[float]) -> str:
    """One character a value, or for the mean of several where there are more than `WIDTH`; a value that is no number leaves a gap."""
    groups = min(len(values), WIDTH)
    cuts = [len(values) * index // groups for index in range(groups + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in itertools.pairwise(cuts)]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    steps = len(_HEIGHTS) - 1

    def height(mean: float) -> str:
        return _HEIGHTS[round((mean - low) / span * steps) if span else 0]

    return "".join(height(mean) if math.isfinite(mean) else " " for mean in means)
