"""A story as one HTML file that needs nothing else: Plotly's library is in it, so curves can be zoomed and read off without a network."""

import html
from collections.abc import Iterable

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from launcher.report.story import Curve, Story, badput_first
from launcher.runs import RunState

_COLOURS = {
    RunState.QUEUED: "#bbbbbb",
    RunState.STARTING: "#f0c05a",
    RunState.RUNNING: "#4f9d69",
    RunState.RECOVERING: "#d9684a",
}
_SYMBOLS = {"failure": "x", "supervisor lost": "x", "notice of the cloud": "triangle-up", "checkpoint": "diamond", "profile": "star"}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; vertical-align: top; padding: .25em .8em .25em 0; }
th { font-weight: 600; white-space: nowrap; } pre { background: #f6f6f6; padding: .8em; overflow-x: auto; white-space: pre-wrap; }
"""


def render(story: Story) -> str:
    """The page."""
    title = html.escape(f"Run {story.status.run_id}")
    parts = [
        f"<h1>{title}</h1>",
        _table(_summary(story)),
        *_section("Loss", _figure(_losses(story), "step", "nats per token")),
        *_section("Throughput", _figure(_throughput(story), "step", "tokens/s", second="seconds a step")),
        *_section("Attempts and faults", _time_line(story)),
        *_section("Where the time went", _phases(story)),
        *_section("Faults", _table([(f"{mark.time:,.0f} s", f"{mark.kind}: {mark.text}") for mark in story.marks if _is_fault(mark.kind)])),
        *_section("Samples", _samples(story)),
        *_section("Settings", f"<pre>{html.escape(story.config)}</pre>"),
    ]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style><script>{get_plotlyjs()}</script>'
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _section(title: str, content: str) -> Iterable[str]:
    """Nothing where there is nothing to say."""
    return [f"<h2>{html.escape(title)}</h2>", content] if content else []


def _summary(story: Story) -> list[tuple[str, str]]:
    status = story.status
    seconds = (status.ended_at or status.updated_at) - status.started_at
    rows = [
        ("state", status.state + (f": {status.reason}" if status.reason else "")),
        ("cluster", f"{status.cluster}, {status.hosts} hosts"),
        ("steps", f"{status.step} of {status.total_steps or '?'}"),
        ("duration", f"{seconds:,.0f} s in {status.attempt + 1} attempts, {status.recoveries.total} recoveries"),
    ]
    if status.loss is not None:
        rows.append(("loss", f"{status.loss:.4f} nats per token"))
    if status.held_out_after is not None:
        before = "" if status.held_out_before is None else f"{status.held_out_before:.4f} before, "
        rows.append(("held-out loss", f"{before}{status.held_out_after:.4f} after"))
    if status.goodput is not None:
        rows.append(("goodput", f"{status.goodput:.1%}"))
    if status.cost_usd is not None:
        rows.append(("cost", f"${status.cost_usd:,.2f} at list price"))
    if status.first_failure is not None:
        rows.append(("last failure", f"{status.first_failure.host}: {status.first_failure.error}"))
    return rows


def _losses(story: Story) -> list[go.Scatter]:
    held_out = story.curves["held_out_loss"]
    return [
        *_line(story.curves["loss"], "loss"),
        *_line(held_out, "held out", mode="lines+markers"),
        *_line(story.undone, "done again", mode="markers", marker={"color": "#bbbbbb", "size": 5}),
    ]


def _throughput(story: Story) -> list[go.Scatter]:
    return [
        *_line(story.curves["tokens_per_second"], "tokens a second"),
        *_line(story.curves["step_time"], "seconds a step", yaxis="y2", line={"dash": "dot"}),
    ]


def _line(curve: Curve, name: str, mode: str = "lines", **how: object) -> list[go.Scatter]:
    return [go.Scatter(x=curve.steps, y=curve.values, name=name, mode=mode, **how)] if curve.steps else []


def _time_line(story: Story) -> str:
    """A row for each attempt, coloured by its state; what happened stands on the row of its attempt."""
    if not story.spans:
        return ""
    bars = []
    for state, colour in _COLOURS.items():
        spans = [span for span in story.spans if span.state is state]
        if spans:
            bars.append(
                go.Bar(
                    x=[span.end - span.begin for span in spans],
                    base=[span.begin for span in spans],
                    y=[f"attempt {span.attempt}" for span in spans],
                    orientation="h",
                    name=state.value,
                    marker_color=colour,
                )
            )
    points = []
    for kind in dict.fromkeys(mark.kind for mark in story.marks):
        marks = [mark for mark in story.marks if mark.kind == kind]
        points.append(
            go.Scatter(
                x=[mark.time for mark in marks],
                y=[f"attempt {mark.attempt}" for mark in marks],
                text=[html.escape(mark.text) for mark in marks],
                mode="markers",
                name=kind,
                marker={"size": 11, "symbol": _SYMBOLS.get(kind, "circle")},
            )
        )
    figure = go.Figure([*bars, *points])
    figure.update_layout(barmode="overlay", height=200 + 40 * len({span.attempt for span in story.spans}))
    figure.update_yaxes(autorange="reversed")
    return _embed(figure, "seconds since the run was submitted", "")


def _phases(story: Story) -> str:
    phases = badput_first(story.status.phases)
    if not phases:
        return ""
    total = sum(seconds for _, seconds in phases)
    bar = go.Bar(
        x=[seconds for _, seconds in phases],
        y=[phase for phase, _ in phases],
        text=[f"{seconds:,.1f} s, {seconds / total:.1%}" for _, seconds in phases],
        orientation="h",
    )
    figure = go.Figure([bar])
    figure.update_layout(height=140 + 26 * len(phases))
    return _embed(figure, "seconds", "")


def _figure(traces: list[go.Scatter], x: str, y: str, second: str | None = None) -> str:
    """`second`: the title of an axis on the right."""
    if not traces:
        return ""
    figure = go.Figure(traces)
    if second is not None:
        figure.update_layout(yaxis2={"title": second, "overlaying": "y", "side": "right", "showgrid": False})
    return _embed(figure, x, y)


def _embed(figure: go.Figure, x: str, y: str) -> str:
    figure.update_layout(template="plotly_white", margin={"l": 60, "r": 60, "t": 20, "b": 50}, legend={"orientation": "h", "y": 1.12})
    figure.update_xaxes(title=x)
    if y:
        figure.update_layout(yaxis_title=y)
    text: str = figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False})
    return text


def _samples(story: Story) -> str:
    """Side by side; a prompt and what the model wrote after it."""
    if not story.samples:
        return ""
    rows = "".join(
        f"<tr><td><pre>{html.escape(sample.prompt)}</pre></td>"
        + "".join(f"<td><pre>{html.escape('' if text is None else text)}</pre></td>" for text in (sample.before, sample.after))
        + "</tr>"
        for sample in story.samples
    )
    return f"<table><tr><th>prompt</th><th>before</th><th>after</th></tr>{rows}</table>"


def _is_fault(kind: str) -> bool:
    return kind not in ("checkpoint", "profile")


def _table(rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in rows)
    return f"<table>{cells}</table>"
