"""Follows a run by its run directory: a live display on a terminal, plain lines elsewhere; ends with the summary."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.cloud_errors import DeadlineExceededError, TransientError
from launcher.goodput import Phase
from launcher.perplexity import perplexity
from launcher.runs import AT_REST, SAMPLES, RunDirectory, RunState, RunStatus

AWAY = (TransientError, DeadlineExceededError)
"""A run directory on Cloud Storage was asked for two minutes, and did not answer."""
SAMPLES_SHOWN = 5
SAMPLE_LENGTH = 200
"""Characters."""
TABLE_WIDTH = 240
"""Of a table where there is no terminal, in characters."""
EXIT_OK = 0
EXIT_JOB_FAILED = 100
EXIT_INTERRUPTED = 130


def follow(run: RunDirectory, console: Console, *, check: Callable[[], str | None], sleep: Callable[[float], None] = time.sleep) -> int:
    """Show the run until it ends; returns the command's exit code. Ctrl-C detaches: the run goes on.

    `check` is called all the time (launcher/watch.py): what it says is shown, and what it raises is passed on.
    """
    try:
        status = _watch(run, console, check, sleep)
    except KeyboardInterrupt:
        console.print(
            f"\ndetached; the run goes on. Follow it again: tpu train attach {run.url}\n"
            f"                           Stop it:         tpu train stop {run.url}",
            highlight=False,
            soft_wrap=True,
        )
        return EXIT_INTERRUPTED
    print_summary(run, status, console)
    return EXIT_OK if status.state is RunState.SUCCEEDED else EXIT_JOB_FAILED


def _watch(run: RunDirectory, console: Console, check: Callable[[], str | None], sleep: Callable[[float], None]) -> RunStatus:
    news = News(run)
    told: str | None = None
    away = False
    display: AbstractContextManager[Live | None] = nullcontext()
    if console.is_terminal:
        display = Live(console=console, refresh_per_second=4, transient=True)
    with display as live:
        while True:
            try:
                status = run.status()
                for line in news.lines(status):
                    console.print(line, highlight=False, soft_wrap=True, markup=False)
                said = None if status is None or status.state in AT_REST else check()
            except AWAY as error:  # the run's supervisor outlasts that, or a next one does
                if not away:
                    console.print(f"{error}; this goes on when it answers again", highlight=False, soft_wrap=True, markup=False)
                away = True
                sleep(run.poll_s)
                continue
            away = False
            if status is not None and status.state in AT_REST:
                return status
            if live is not None and status is not None:
                live.update(_panel(status))
            if said is not None and said != told:
                console.print(said, highlight=False, soft_wrap=True, markup=False)
            told = said
            sleep(run.poll_s)


class News:
    """Turns what is new in the run directory into lines."""

    def __init__(self, run: RunDirectory) -> None:
        self._events, self._metrics = run.events(), run.metrics()
        for past in (self._events, self._metrics):
            deque(past, maxlen=0)  # what is there already is no news
        self._phase = ""

    def lines(self, status: RunStatus | None) -> Iterator[str]:
        if status is None:
            return
        for event in self._events:
            if text := _describe_event(event):
                yield f"{clock_text(event['time'] - status.started_at)}  {text}"
        for row in self._metrics:
            if "held_out_loss" in row:  # told by its event
                continue
            yield f"{clock_text(row['time'] - status.started_at)}  {_describe_step(row, status)}"
        if status.phase and status.phase != self._phase and status.phase not in ("training", "saving"):
            yield f"{clock_text(status.updated_at - status.started_at)}  {status.phase}"
        self._phase = status.phase


def _describe_event(event: dict[str, Any]) -> str | None:
    match event["event"]:
        case "hosts":
            return f"{len(event['hosts'])} hosts: {', '.join(event['hosts'])}"
        case "data":
            return _describe_data(event)
        case "evaluation":
            when = f"after step {event['step']}" if event["when"] == "during" else f"{event['when']} training"
            parts = f"; {_by_part(event['parts'])}" if event.get("parts") else ""
            return f"held-out loss {when}: {event['loss']:.4f} nat a token, perplexity {perplexity(event['loss']):.4g}{parts}"
        case "checkpoint":
            return f"checkpoint of step {event['step']}"
        case "restored":
            return f"restored from the checkpoint of step {event['step']}"
        case "checkpoint_set_aside":
            return f"checkpoint of step {event['step']} set aside: {event['reason']}"
        case "failure":
            return f"attempt {event['attempt']} failed at step {event['step']} on host {event['host']} ({event['cause']}): {event['error']}"
        case "supervisor_lost":
            return f"the supervisor of attempt {event['attempt']} was lost at step {event['step']}: {event['reason']}"
        case "straggler":
            return f"host {event['host']} is slow: the others wait {event['extra_s']:.2f} s of each {event['step_s']:.2f} s step for it"
        case "profile":
            return f"profile of steps {event['first']} to {event['last']} on host {event['host']}"
        case "backoff":
            return f"attempt {event['attempt']} starts in {event['seconds']:.0f} s: the one before came no further"
        case "state" if event["state"] == RunState.RECOVERING:
            return f"starting attempt {event['attempt']}"
    return None


def _by_part(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())


def _describe_data(event: dict[str, Any]) -> str:
    parts, held_out = event["parts"].values(), event["held_out"]
    counts = {name: sum(part[name] for part in parts) for name in ("documents", "tokens", "rows")}
    cut = sum(part["cut"] for part in (*parts, held_out))
    longer = f"; {cut:,} documents are longer than trainer.seq_len and are cut" if cut else ""
    return (
        f"data: {counts['documents']:,} documents, {counts['tokens']:,} tokens in {counts['rows']:,} sequences; "
        f"{held_out['documents']:,} documents held out{longer}"
    )


def _describe_step(row: dict[str, Any], status: RunStatus) -> str:
    rate = f"  {row['tokens_per_second']:,.0f} tokens/s" if row.get("tokens_per_second") else ""
    mfu = f"  MFU {row['mfu']:.1%}" if row.get("mfu") else ""
    loss = "" if row.get("loss") is None else f"  loss {row['loss']:.4f}"
    return f"step {row['step']}/{status.total_steps or '?'}{loss}{rate}{mfu}"


def _panel(status: RunStatus) -> Table:
    table = Table.grid(padding=(0, 2))
    # Text and not markup: a line printed without markup while the display is up would show its brackets.
    table.add_row("run", Text.assemble(status.run_id, "  ", (status.state, "bold"), "  ", status.phase))
    done = status.step / status.total_steps if status.total_steps else 0.0
    bar = "█" * round(done * 30) + "░" * (30 - round(done * 30))
    table.add_row("step", f"{status.step}/{status.total_steps or '?'}  {bar}  {_time_left(status)}")
    if status.loss is not None:
        rate = f"  {status.tokens_per_second:,.0f} tokens/s" if status.tokens_per_second else ""
        table.add_row("loss", f"{status.loss:.4f}{rate}")
    if status.recoveries.total:
        table.add_row("recoveries", str(status.recoveries.total))
    return table


def _time_left(status: RunStatus) -> str:
    trained = status.phases.get(Phase.TRAINING, 0.0)
    if not (status.highest_step and status.total_steps and trained):
        return ""
    return f"{clock_text((status.total_steps - status.step) * trained / status.highest_step)} left"


def print_summary(run: RunDirectory, status: RunStatus, console: Console) -> None:
    """Final loss, time by phase, where everything is."""

    def line(title: str, text: str) -> None:
        console.print(f"{title:<12}{text}", highlight=False, soft_wrap=True, markup=False)

    seconds = (status.ended_at or status.updated_at) - status.started_at
    console.print()
    line("result", f"{status.state} after {clock_text(seconds)}" + (f": {status.reason}" if status.reason else ""))
    if status.first_failure and status.state is not RunState.SUCCEEDED:
        line("failure", f"host {status.first_failure.host}: {status.first_failure.error}")
    loss = "" if status.loss is None else f", loss {status.loss:.4f}"
    if status.step or status.total_steps:  # a script may report nothing
        line("training", f"step {status.step} of {status.total_steps or '?'}{loss}")
    if status.held_out_before is not None and status.held_out_after is not None:
        change = f"perplexity {perplexity(status.held_out_before):.4g} and {perplexity(status.held_out_after):.4g}"
        line("held out", f"{status.held_out_before:.4f} nat a token before, {status.held_out_after:.4f} after; {change}")
    elif status.held_out_after is not None:
        line("held out", f"{status.held_out_after:.4f} nat a token, perplexity {perplexity(status.held_out_after):.4g}")
    if status.held_out_parts:
        line("  of parts", _by_part(status.held_out_parts))
    for sample in _samples(run):
        line(*sample)
    if status.recoveries.total:
        causes = ", ".join(f"{count} {cause}" for cause, count in vars(status.recoveries).items() if count)
        line("recoveries", f"{status.recoveries.total} ({causes})")
    phases = sorted(status.phases.items(), key=lambda item: -item[1])
    line("time", ", ".join(f"{phase} {spent:.1f} s" for phase, spent in phases if spent >= 0.05))
    if status.goodput is not None:
        line("goodput", f"{status.goodput:.1%} of {clock_text(sum(status.phases.values()))} trained something new")
    if status.cost_usd is not None:
        useful = f", ${status.costs.get(Phase.TRAINING, 0.0):.2f} of it trained something new" if status.cost_usd else ""
        line("cost", f"${status.cost_usd:.2f} (estimate by list price){useful}")
    line("directory", run.url)


def _samples(run: RunDirectory) -> Iterator[tuple[str, str]]:
    """(title, text) of what the model wrote, by prompt: the newest text before training, and the newest after."""
    texts: dict[str, dict[str, str]] = {}
    for row in run.samples():
        texts.setdefault(row["prompt"], {})[row["when"]] = row["text"]
    for prompt, written in list(texts.items())[:SAMPLES_SHOWN]:
        yield "sample", _quoted(prompt)
        for when in ("before", "after"):
            if when in written:
                yield f"  {when}", _quoted(written[when])
    if len(texts) > SAMPLES_SHOWN:
        yield "", f"{len(texts) - SAMPLES_SHOWN} more in {SAMPLES}"


def _quoted(text: str) -> str:
    """On one line, and no longer than one reads."""
    short = text if len(text) <= SAMPLE_LENGTH else text[:SAMPLE_LENGTH] + "..."
    return json.dumps(short, ensure_ascii=False)


def table_console() -> Console:
    """For tables on stdout. Where that is no terminal their cells are neither cut nor folded, so that other programs can read them."""
    console = Console()
    return console if console.is_terminal else Console(width=TABLE_WIDTH)


def step_text(status: RunStatus) -> str:
    """How far a run is; nothing where it tells of no steps."""
    return f"{status.step}/{status.total_steps or '?'}" if status.step or status.total_steps else ""


def loss_text(status: RunStatus) -> str:
    return "" if status.loss is None else f"{status.loss:.4f}"


def clock_text(seconds: float) -> str:
    """A length of time: 1:02:03, or 02:03 below an hour."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60:02d}:{rest % 60:02d}"
