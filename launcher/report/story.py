"""What a run's directory tells, in the form that the page shows it in. Knows no plotting library."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from launcher.goodput import Phase
from launcher.runs import AT_REST, RunDirectory, RunState, RunStatus

MARKS: Mapping[str, str] = {
    "failure": "failure",
    "supervisor_lost": "supervisor lost",
    "notice": "notice of the cloud",
    "straggler": "slow host",
    "checkpoint": "checkpoint",
    "checkpoint_set_aside": "checkpoint set aside",
    "profile": "profile",
}
"""Events that the time line shows, and what it calls them."""


@dataclass(frozen=True)
class Span:
    """A time in which an attempt was in one state."""

    attempt: int
    state: RunState
    begin: float
    """Seconds since the run was submitted."""
    end: float


@dataclass(frozen=True)
class Mark:
    """Something that happened at a moment."""

    kind: str
    """A value of MARKS."""
    attempt: int
    time: float
    """Seconds since the run was submitted."""
    text: str


@dataclass(frozen=True)
class Curve:
    """A measurement by step."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Sample:
    """What the model wrote; None where it did not."""

    prompt: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Story:
    """All that the page says."""

    status: RunStatus
    config: str
    """YAML, as it is in the run directory: names of secrets, no values."""
    spans: list[Span]
    marks: list[Mark]
    curves: Mapping[str, Curve]
    """loss, held_out_loss, tokens_per_second, step_time, mfu: of a step that was done again the later one."""
    undone: Curve
    """Losses of steps that were done again."""
    samples: list[Sample]


def read_story(run: RunDirectory) -> Story | None:
    """None for a run that was never submitted. Raises ConfigError when there is no config.yaml."""
    status = run.status()
    if status is None:
        return None
    events, rows = list(run.events()), list(run.metrics())
    config = yaml.safe_dump(run.config().to_dict(), sort_keys=False)
    names = ("loss", "held_out_loss", "tokens_per_second", "step_time", "mfu")
    curves = {name: curve(rows, name) for name in names}
    return Story(status, config, spans(status, events), list(marks(status, events)), curves, undone(rows), samples(run.samples()))


def spans(status: RunStatus, events: Iterable[Mapping[str, Any]]) -> list[Span]:
    """From the submission to now or the end; a run that was taken up again rests in between."""
    found: list[Span] = []
    begin, state, attempt = status.started_at, RunState.QUEUED, 0
    for event in events:
        if event["event"] != "state":
            continue
        found.append(Span(attempt, state, begin - status.started_at, event["time"] - status.started_at))
        begin, state, attempt = event["time"], RunState(event["state"]), event["attempt"]
    if state not in AT_REST:
        found.append(Span(attempt, state, begin - status.started_at, status.updated_at - status.started_at))
    return [span for span in found if span.end > span.begin and span.state not in AT_REST]


def marks(status: RunStatus, events: Iterable[Mapping[str, Any]]) -> Iterable[Mark]:
    attempt = 0
    for event in events:
        attempt = event.get("attempt", attempt)
        if (kind := MARKS.get(event["event"])) is not None:
            yield Mark(kind, attempt, event["time"] - status.started_at, describe(event))


def describe(event: Mapping[str, Any]) -> str:
    """Everything that an event says beside its name and its time."""
    return ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("event", "time", "attempt"))


def curve(rows: Iterable[Mapping[str, Any]], name: str) -> Curve:
    """`rows`: of metrics.jsonl."""
    by_step = {row["step"]: row[name] for row in rows if row.get(name) is not None}
    steps = sorted(by_step)
    return Curve(steps, [by_step[step] for step in steps])


def undone(rows: Iterable[Mapping[str, Any]]) -> Curve:
    """Losses of steps that a later attempt did again."""
    last: dict[int, float] = {}
    found: list[tuple[int, float]] = []
    for row in rows:
        if row.get("loss") is None:
            continue
        if row["step"] in last:
            found.append((row["step"], last[row["step"]]))
        last[row["step"]] = row["loss"]
    found.sort()
    return Curve([step for step, _ in found], [loss for _, loss in found])


def samples(rows: Iterable[Mapping[str, Any]]) -> list[Sample]:
    """By prompt, the newest text before training and the newest after."""
    texts: dict[str, dict[str, str]] = {}
    for row in rows:
        texts.setdefault(row["prompt"], {})[row["when"]] = row["text"]
    return [Sample(prompt, written.get("before"), written.get("after")) for prompt, written in texts.items()]


def badput_first(phases: Mapping[str, float]) -> list[tuple[str, float]]:
    """Phases with their seconds, the longest last, training at the end."""
    return sorted(phases.items(), key=lambda item: (item[0] == Phase.TRAINING, item[1]))
