"""What a run's status says after what its training process said."""

from pathlib import Path

import pytest

from launcher.gang.record import RunRecord
from launcher.goodput import Phase
from launcher.runs import RunDirectory, RunState, RunStatus


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    status = RunStatus(run_id="r", cluster="c", state=RunState.RECOVERING, attempt=1, phase=Phase.STARTING, step=17)
    return RunRecord(RunDirectory(tmp_path), status, lambda: 1000.0, None)


def test_a_checkpoint_tells_of_the_last_step_where_nothing_else_did(record: RunRecord) -> None:
    record.apply({"event": "checkpoint", "step": 18, "time": 1.0})
    assert (record.status.checkpoint, record.status.step) == (18, 18)
    record.apply({"event": "checkpoint", "step": 10, "time": 1.0})  # of a write that the steps have overtaken
    assert (record.status.checkpoint, record.status.step) == (10, 18)


def test_a_script_is_never_seen_in_a_run_that_still_recovers(record: RunRecord, tmp_path: Path) -> None:
    record.write()
    record.apply({"event": "phase", "phase": "script", "time": 1.0})
    seen = RunDirectory(tmp_path).status()
    assert seen is not None
    assert (seen.state, seen.phase) == (RunState.RECOVERING, Phase.STARTING)
    record.enter(RunState.RUNNING, record.status.phase)
    seen = RunDirectory(tmp_path).status()
    assert seen is not None
    assert (seen.state, seen.phase) == (RunState.RUNNING, Phase.SCRIPT)
