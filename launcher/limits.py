"""How long a run may last and what it may cost, in all: over all attempts, and however often it was taken up again."""

from collections.abc import Mapping

from launcher.config import RunConfig
from launcher.goodput import Phase


def limit_reached(run: RunConfig, phases: Mapping[str, float], costs: Mapping[str, float]) -> str | None:
    """Which setting ends the run, in words; None when none does. `phases` and `costs` as in status.json: seconds and US dollars by phase.

    Waiting for capacity counts as time, idle time does not.
    """
    hours = sum(seconds for phase, seconds in phases.items() if phase != Phase.IDLE) / 3600
    if run.max_hours is not None and hours >= run.max_hours:
        return f"run.max_hours={run.max_hours:g} is reached"
    if run.max_usd is not None and sum(costs.values()) >= run.max_usd:
        return f"run.max_usd={run.max_usd:g} is reached (estimate by list price)"
    return None
