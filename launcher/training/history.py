"""How often a run has failed and how long it has trained, from its own events. Knows no files."""

from collections.abc import Iterable, Mapping
from typing import Any

from launcher.training.saving import History

_TRAINING, _FAILED = "RUNNING", "RECOVERING"


def history_of(events: Iterable[Mapping[str, Any]]) -> History:
    """From the events of a run directory: RECOVERING counts as a failure, the time in RUNNING as training; an attempt that still runs
    (or whose end nobody saw) counts up to its last event.
    """
    failures, seconds = 0, 0.0
    since: float | None = None
    last = 0.0
    for event in events:
        last = float(event["time"])
        if event["event"] != "state":
            continue
        if since is not None:
            seconds += last - since
        since = last if event["state"] == _TRAINING else None
        failures += event["state"] == _FAILED
    if since is not None:
        seconds += last - since
    return History(failures, seconds)
