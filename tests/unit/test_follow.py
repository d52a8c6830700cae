"""What a person sees of a run, from its run directory alone."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from cluster.cloud_errors import DeadlineExceededError, TransientError
from launcher.follow import EXIT_INTERRUPTED, EXIT_JOB_FAILED, EXIT_OK, follow
from launcher.runs import FirstFailure, Recoveries, RunDirectory, RunState, RunStatus

Action = Callable[[], None]
WRITTEN = {"before": "xx", "after": "x):\n    return 1"}
PARTS = {"mine": 2.0, "code": 3.0}
SAMPLE_ROWS = "".join(json.dumps({"when": when, "step": 0, "prompt": "def f(", "text": text}) + "\n" for when, text in WRITTEN.items())
COUNTS = {"documents": 1200, "tokens": 34567, "rows": 99, "cut": 3}


def status(state: RunState, **more: object) -> RunStatus:
    return RunStatus("r", "c", state, started_at=100.0, updated_at=160.0, total_steps=10, **more)  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "r")
    directory.path.mkdir()
    directory.write_status(status(RunState.QUEUED))
    return directory


def watch(run: RunDirectory, *actions: Action, terminal: bool = False, check: Callable[[], str | None] = lambda: None) -> tuple[int, str]:
    """Follow the run while `actions` happen, one at each poll."""
    left = list(actions)
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=200)
    code = follow(run, console, check=check, sleep=lambda _: left.pop(0)())
    return code, output.getvalue()


def metric(run: RunDirectory, step: int, loss: float) -> Action:
    row = {"step": step, "attempt": 0, "time": 130.0, "loss": loss, "tokens_per_second": 1234.5, "mfu": None}

    def write() -> None:
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    return write


def write_text(path: Path, text: str) -> None:
    path.write_text(text)


def test_plain_lines_tell_of_phases_steps_and_events(run: RunDirectory) -> None:
    code, text = watch(
        run,
        lambda: run.write_status(status(RunState.STARTING, phase="waiting for capacity")),
        lambda: run.append_event({"time": 120.0, "event": "hosts", "hosts": ["s/0", "s/1"]}),
        lambda: run.append_event({"time": 125.0, "event": "data", "parts": {"data": COUNTS}, "held_out": COUNTS}),
        metric(run, 5, 2.25),
        lambda: run.append_event({"time": 140.0, "event": "checkpoint", "step": 5}),
        lambda: write_text(run.path / "samples.jsonl", SAMPLE_ROWS),
        lambda: run.append_event({"time": 141.0, "event": "evaluation", "when": "during", "step": 5, "loss": 2.5, "parts": PARTS}),
        lambda: run.write_status(
            status(
                RunState.SUCCEEDED,
                step=10,
                loss=2.0,
                ended_at=165.0,
                phases={"training": 50.0, "compiling": 10.0},
                goodput=50 / 60,
                cost_usd=6.0,
                costs={"training": 5.0, "compiling": 1.0},
                held_out_before=5.0,
                held_out_after=3.0,
                held_out_parts=PARTS,
                recoveries=Recoveries(infrastructure=1),
            )
        ),
    )
    assert code == EXIT_OK
    for line in (
        "01:00  waiting for capacity",
        "00:20  2 hosts: s/0, s/1",
        "00:25  data: 1,200 documents, 34,567 tokens in 99 sequences; 1,200 documents held out; "
        "6 documents are longer than trainer.seq_len and are cut",
        "00:30  step 5/10  loss 2.2500  1,234 tokens/s",
        "00:40  checkpoint of step 5",
        "00:41  held-out loss after step 5: 2.5000 nat a token, perplexity 12.18; mine 2.0000, code 3.0000",
        "result      SUCCEEDED after 01:05",
        "training    step 10 of 10, loss 2.0000",
        "held out    5.0000 nat a token before, 3.0000 after; perplexity 148.4 and 20.09",
        "  of parts  mine 2.0000, code 3.0000",
        'sample      "def f("',
        '  before    "xx"',
        '  after     "x):\\n    return 1"',
        "recoveries  1 (1 infrastructure)",
        "time        training 50.0 s, compiling 10.0 s",
        "goodput     83.3% of 01:00 trained something new",
        "cost        $6.00 (estimate by list price), $5.00 of it trained something new",
        f"directory   {run.path}",
    ):
        assert line in text.splitlines(), line


def test_a_failed_run_ends_with_100_and_names_the_first_host(run: RunDirectory) -> None:
    ended = status(RunState.FAILED, reason="application error", first_failure=FirstFailure("s/1", "ValueError: bad [batch]"))
    code, text = watch(run, lambda: run.write_status(ended))
    assert code == EXIT_JOB_FAILED
    assert "result      FAILED after 01:00: application error" in text.splitlines()
    assert "failure     host s/1: ValueError: bad [batch]" in text.splitlines()


def test_ctrl_c_detaches_and_says_how_to_come_back(run: RunDirectory) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    code, text = watch(run, interrupt)
    assert code == EXIT_INTERRUPTED
    assert f"tpu train attach {run.path}" in text
    assert f"tpu train stop {run.path}" in text


def test_a_run_directory_that_does_not_answer_is_waited_for(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    known = RunDirectory.status
    answers: list[Exception | None] = [
        None,
        TransientError("busy", resource="gs://b/r"),
        DeadlineExceededError("silence", resource="gs://b/r"),
    ]

    def ask(self: RunDirectory) -> RunStatus | None:
        if answers and (error := answers.pop(0)) is not None:
            raise error
        return known(self)

    monkeypatch.setattr(RunDirectory, "status", ask)
    code, text = watch(run, lambda: None, lambda: None, lambda: None, lambda: run.write_status(status(RunState.FAILED)))
    assert code == EXIT_JOB_FAILED
    (line,) = [line for line in text.splitlines() if "this goes on when it answers again" in line]
    assert "gs://b/r" in line


def test_a_terminal_shows_a_live_bar_with_the_time_left(run: RunDirectory) -> None:
    _, text = watch(
        run,
        lambda: run.write_status(status(RunState.STARTING, phase="compiling")),
        lambda: run.write_status(status(RunState.RUNNING, phase="training", step=5, highest_step=5, loss=2.5, phases={"training": 30.0})),
        metric(run, 5, 2.5),
        lambda: None,
        lambda: run.write_status(status(RunState.SUCCEEDED, step=10)),
        terminal=True,
    )
    assert "5/10" in text
    assert "[bold]" not in text
    assert "00:30 left" in text


def test_a_line_that_is_still_being_written_is_shown_once_it_is_whole(run: RunDirectory) -> None:
    path = run.path / "events.jsonl"
    whole = json.dumps({"time": 120.0, "event": "checkpoint", "step": 5}) + "\n"
    _, text = watch(
        run,
        lambda: write_text(path, whole[:20]),
        lambda: write_text(path, whole),
        lambda: run.write_status(status(RunState.FAILED)),
    )
    assert text.count("checkpoint of step 5") == 1


def test_a_line_is_told_once_when_it_is_whole_and_never_when_it_was_torn(run: RunDirectory) -> None:
    rows = run.metrics()
    path = run.path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    assert [row["step"] for row in rows] == [1]
    assert list(rows) == []
    with path.open("a") as file:
        file.write('p": 2}\n{"step": 3, "lo\n{"step": 4}\n')
    assert [row["step"] for row in rows] == [2, 4]
    assert [row["step"] for row in run.metrics()] == [1, 2, 4]
