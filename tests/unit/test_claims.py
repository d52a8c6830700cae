"""Who may write a run, and what becomes of those who may not any more."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from cluster.secret_place import SecretPlace
from launcher.attempts import claim_next, end_run, next_attempt, settle
from launcher.claims import Claims, Superseded
from launcher.config import LaunchConfig
from launcher.data.config import DataConfig
from launcher.gang.lease import SILENCE_S
from launcher.gang.record import RunRecord
from launcher.gang.supervisor import wait_for_silence
from launcher.index import Entry, RunIndex
from launcher.models.config import ModelConfig
from launcher.runs import RunDirectory, RunState, RunStatus, StopRequest


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "r")
    cluster = ClusterConfig(name="c", accelerator_type="v4-16", cloud="emulated")
    directory.create(LaunchConfig(cluster, ModelConfig("gemma3-nano"), DataConfig("python_stdlib")))
    return directory


@pytest.fixture
def index(tmp_path: Path) -> RunIndex:
    return RunIndex(str(tmp_path / "index"))


def record(run: RunDirectory, attempt: int = 0, **more: object) -> RunRecord:
    status = RunStatus("r", "c", RunState.RUNNING, attempt=attempt, job="r", **more)  # type: ignore[arg-type]
    return RunRecord(run, status, lambda: 1000.0, None)


def test_exactly_one_of_many_gets_an_attempt(run: RunDirectory) -> None:
    claims = Claims(run.files)
    for attempt in range(20):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda holder, attempt=attempt: claims.claim(attempt, f"job-{holder}"), range(8)))
        assert won.count(True) == 1
        newest = claims.newest()
        assert newest is not None
        assert (newest.attempt, newest.holder) == (attempt, f"job-{won.index(True)}")
    assert sorted(path.name for path in (run.path / "claims").iterdir()) == sorted(f"{attempt}.json" for attempt in range(20))


def test_an_attempt_behind_the_newest_is_nobodys(run: RunDirectory) -> None:
    claims = Claims(run.files)
    assert claims.newest() is None
    claims.check(0)
    assert claims.claim(3, "a")
    assert not claims.claim(2, "b")
    assert (claims.holds("a"), claims.holds("b")) == (True, False)
    claims.check(3)
    with pytest.raises(Superseded, match=r"attempt 3 \(a\) has taken the run over from attempt 2"):
        claims.check(2)


def test_attempts_are_numbered_behind_status_and_claims(run: RunDirectory) -> None:
    assert next_attempt(run) == 0
    run.write_status(RunStatus("r", "c", RunState.QUEUED, attempt=4))
    assert next_attempt(run) == 5
    assert claim_next(run) == (5, "r-5")
    assert next_attempt(run) == 6


def test_a_supervisor_that_was_replaced_writes_nothing_any_more(run: RunDirectory) -> None:
    assert Claims(run.files).claim(0, "r")
    old = record(run)
    old.write()
    assert claim_next(run) == (1, "r-1")
    before = (run.path / "status.json").read_bytes()
    for write in (old.write, lambda: old.event("failure"), lambda: old.enter(RunState.SUCCEEDED, ""), lambda: old.hold_slices([], 0)):
        with pytest.raises(Superseded):
            write()
    assert (run.path / "status.json").read_bytes() == before
    assert list(run.events()) == []


def test_a_recovery_claims_its_attempt_or_ends(run: RunDirectory) -> None:
    assert Claims(run.files).claim(0, "r")
    ours = record(run)
    ours.enter(RunState.RECOVERING, "recovering", attempt=1)
    newest = Claims(run.files).newest()
    assert newest is not None
    assert (newest.attempt, newest.holder) == (1, "r")
    Claims(run.files).claim(2, "another")
    with pytest.raises(Superseded):
        ours.enter(RunState.RECOVERING, "recovering", attempt=2)


def test_a_stop_for_later_suspends_the_run(run: RunDirectory) -> None:
    run.request_stop(StopRequest.SUSPEND)
    ours = record(run)
    ours.enter(RunState.STOPPED, "", reason="stopped on request")
    status = run.status()
    assert status is not None
    assert status.state is RunState.SUSPENDED
    run.request_stop()
    assert run.stop_requested() is StopRequest.SAVE


def test_a_run_that_somebody_ends_is_left_by_whoever_had_it(run: RunDirectory, index: RunIndex, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.touch()
    index.write(Entry(str(run.path), SecretPlace(file=str(secret)), ["HF_TOKEN"]))
    ours = record(run, updated_at=900.0)
    ours.write()
    end_run(run, RunState.STOPPED, "cluster 'c' was stopped", index, lambda: 2000.0)
    status = run.status()
    assert status is not None
    assert (status.state, status.ended_at, status.quiet_at) == (RunState.STOPPED, 2000.0, 1000.0 + SILENCE_S)
    assert (index.entries(), secret.exists()) == ([], False)
    with pytest.raises(Superseded):
        ours.write()
    end_run(run, RunState.FAILED, "too late", index)
    again = run.status()
    assert again == status


def test_a_supervisor_whose_words_may_have_waited_is_given_time_from_its_successors_claim_on(run: RunDirectory, index: RunIndex) -> None:
    record(run, updated_at=900.0).write()
    run.files.unheard_s = math.inf  # as on gs://
    end_run(run, RunState.STOPPED, "cluster 'c' was stopped", index, lambda: 2000.0)
    status = run.status()
    assert status is not None
    assert status.quiet_at == 2000.0 + SILENCE_S


def test_a_suspended_run_keeps_its_entry_and_no_secret(run: RunDirectory, index: RunIndex, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.touch()
    index.write(Entry(str(run.path), SecretPlace(file=str(secret)), ["HF_TOKEN"]))
    record(run).write()
    end_run(run, RunState.SUSPENDED, "cluster 'c' was stopped", index)
    status = run.status()
    assert status is not None
    assert (status.state, status.ended_at) == (RunState.SUSPENDED, None)
    assert index.entries() == [Entry(str(run.path), None, ["HF_TOKEN"])]
    assert not secret.exists()
    settle(run, index)
    end_run(run, RunState.STOPPED, "given up", index)
    assert index.entries() == []


def test_a_next_supervisor_waits_until_nothing_of_the_one_before_can_live(run: RunDirectory) -> None:
    now = [1000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    wait_for_silence(record(run, quiet_at=1007.0), lambda: now[0], sleep)
    assert 1007.0 <= now[0] < 1008.0
    wait_for_silence(record(run, quiet_at=1007.0), lambda: now[0], sleep)
    assert now[0] < 1008.0, "it is over"
