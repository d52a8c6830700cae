"""`tpu train compare A B`: what two runs were set to, and how their losses went."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table

from cluster.schema import flatten
from launcher.cli.options import CONSOLE, DEFAULT_ROOT, Root, locate_run
from launcher.cli.train_status import losses, sparkline

ROWS = 10
"""How many steps of the curves are shown beside each other."""
_PLACE = ("run.name", "run.root", "run.resume")


def compare(
    first: Annotated[str, typer.Argument(help="A run's name, or the path of its directory.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    root: Root = DEFAULT_ROOT,
) -> None:
    """Show two runs beside each other: settings that differ, and losses at the same steps."""
    runs = [locate_run(first, root), locate_run(second, root)]
    settings = [dict(flatten(run.config().to_dict())) for run in runs]
    table = Table("SETTING", *(run.run_id for run in runs), box=None)
    for name in differences(*settings):
        table.add_row(name, *(_text(values.get(name, "not set")) for values in settings))
    CONSOLE.print(table if table.row_count else "no setting differs")
    CONSOLE.print()
    curves = losses(runs[0]), losses(runs[1])
    for run, curve in zip(runs, curves, strict=True):
        if curve:
            line = sparkline([curve[step] for step in sorted(curve)])
            CONSOLE.print(f"{run.run_id:<30} {line} {curve[max(curve)]:.4f} at step {max(curve)}", highlight=False, markup=False)
    common = shown_steps(*curves)
    if not common:
        CONSOLE.print("no step was logged by both")
        return
    table = Table("STEP", *(run.run_id for run in runs), "DIFFERENCE", box=None)
    for step in common:
        one, other = (curve[step] for curve in curves)
        table.add_row(str(step), f"{one:.4f}", f"{other:.4f}", f"{other - one:+.4f}")
    CONSOLE.print(table)
    for when in ("before", "after"):
        values = [getattr(status, f"held_out_{when}") for run in runs if (status := run.status()) is not None]
        match values:
            case [float(), float()]:
                text = f"held-out loss {when:<10} {values[0]:.4f} and {values[1]:.4f}: {values[1] - values[0]:+.4f}"
                CONSOLE.print(text, highlight=False)


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of settings whose values differ, without those that only say where a run is."""
    return [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name) and name not in _PLACE]


def shown_steps(one: Mapping[int, float], other: Mapping[int, float], rows: int = ROWS) -> list[int]:
    """At most `rows` of the steps that both have, spread evenly, with the first and the last."""
    common = sorted(set(one) & set(other))
    if len(common) <= rows:
        return common
    return [common[round(index * (len(common) - 1) / (rows - 1))] for index in range(rows)]


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
