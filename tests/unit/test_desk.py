"""A supervisor whose run directory does not answer goes on with its gang, and nothing that it said is lost or out of order."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.cloud_errors import PermissionDeniedError, Service
from launcher.claims import Claims, Superseded
from launcher.gang.desk import Desk, Unwritten
from launcher.gang.record import RunRecord
from launcher.gang.supervisor import EXIT_UNFINISHED, watch_over
from launcher.run_files import LocalFiles
from launcher.runs import RunDirectory, RunState, RunStatus, StopRequest

SOON_S = 20.0
BEFORE = RunStatus("r", "c", RunState.RUNNING, job="r")


class Outage(LocalFiles):
    """Local files that hold every request up while they are away, and count what they are asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.there = threading.Event()
        self.there.set()
        self.waits = threading.Event()
        self.asked: list[str] = []
        self.refusal: Exception | None = None

    def read(self, name: str) -> bytes | None:
        self._ask("read", name)
        return super().read(name)

    def write(self, name: str, content: bytes) -> None:
        self._ask("write", name)
        super().write(name, content)

    def append(self, name: str, content: bytes) -> None:
        self._ask("append", name)
        super().append(name, content)

    def create(self, name: str, content: bytes) -> bool:
        self._ask("create", name)
        return super().create(name, content)

    def list(self, folder: str) -> list[str]:
        self._ask("list", folder)
        return super().list(folder)

    def _ask(self, how: str, name: str) -> None:
        if not self.there.is_set():
            self.waits.set()
            assert self.there.wait(SOON_S)
        if self.refusal is not None:
            raise self.refusal
        self.asked.append(f"{how} {name}")


@pytest.fixture
def files(tmp_path: Path) -> Outage:
    return Outage(tmp_path / "r")


@pytest.fixture
def run(files: Outage) -> RunDirectory:
    directory = RunDirectory(files.folder)
    directory.write_status(BEFORE)
    directory.files = files
    Claims(files).claim(0, "r")
    files.asked.clear()
    return directory


def desk_of(run: RunDirectory, limit: float = SOON_S, wait: Callable[[float], object] = lambda _: None) -> Desk:
    return Desk(run, BEFORE, background=True, limit=limit, wait=wait)


def record_of(run: RunDirectory, desk: Desk) -> RunRecord:
    return RunRecord(run, BEFORE, lambda: 1000.0, None, desk)


def step(number: int) -> dict[str, object]:
    return {"event": "step", "step": number, "total_steps": 9, "loss": 1.0}


def names(run: RunDirectory) -> list[str]:
    return [event["event"] for event in run.events()]


def test_nobody_waits_for_a_place_that_is_away_and_all_is_written_in_order_when_it_is_back(run: RunDirectory, files: Outage) -> None:
    desk = desk_of(run)
    record = record_of(run, desk)
    files.there.clear()
    for number in range(5):
        record.apply(step(number))
        record.write()
        record.event("checkpoint", step=number)
        assert record.stop_requested() is None
        record.tick()
    assert files.waits.wait(SOON_S)
    assert files.asked == []
    files.there.set()
    desk.flush()
    assert [(event["event"], event["step"]) for event in run.events()] == [("checkpoint", number) for number in range(5)]
    status = run.status()
    assert status is not None
    assert status.step == 4


def test_of_several_statuses_that_wait_only_the_newest_is_written(run: RunDirectory, files: Outage) -> None:
    desk = desk_of(run)
    record = record_of(run, desk)
    files.there.clear()
    record.event("first")
    assert files.waits.wait(SOON_S)
    for number in range(100):
        record.apply(step(number))
        record.write()
    files.there.set()
    desk.flush()
    assert files.asked.count("write status.json") == 1


def test_a_status_costs_one_small_read_and_its_writing(run: RunDirectory, files: Outage) -> None:
    record = record_of(run, Desk(run, BEFORE))
    record.write()
    assert files.asked == ["read claims/1.json", "write status.json"]


def test_an_end_is_shown_behind_everything_that_came_before(run: RunDirectory, files: Outage) -> None:
    record = record_of(run, desk_of(run))
    files.there.clear()
    record.event("checkpoint", step=9)
    record.write()
    timer = threading.Timer(0.05, files.there.set)
    timer.start()
    record.enter(RunState.SUCCEEDED, "", ended_at=1000.0)
    assert files.there.is_set(), "it waited"
    assert names(run) == ["checkpoint", "state"]
    assert files.asked[-1] == "write status.json"
    status = run.status()
    assert status is not None
    assert status.state is RunState.SUCCEEDED


def test_an_attempt_is_claimed_behind_everything_that_came_before(run: RunDirectory, files: Outage) -> None:
    record = record_of(run, desk_of(run))
    files.there.clear()
    record.event("failure")
    threading.Timer(0.05, files.there.set).start()
    record.enter(RunState.RECOVERING, "recovering", attempt=1)
    assert files.asked.index("append events.jsonl") < files.asked.index("create claims/1.json")


def test_who_waits_for_an_answer_does_not_wait_for_ever(run: RunDirectory, files: Outage) -> None:
    record = record_of(run, desk_of(run, limit=0.05))
    files.there.clear()
    with pytest.raises(Unwritten, match=r"nothing could be written for 0 s: it does not answer"):
        record.enter(RunState.SUCCEEDED, "", ended_at=1000.0)
    files.there.set()


def test_a_supervisor_that_was_replaced_hears_of_it_at_its_next_word(run: RunDirectory, files: Outage) -> None:
    desk = desk_of(run)
    record = record_of(run, desk)
    Claims(LocalFiles(files.folder)).claim(1, "another")
    record.event("checkpoint", step=1)
    with pytest.raises(Superseded, match="another"):
        desk.flush()
    for word in (record.tick, record.write, lambda: record.event("later")):
        with pytest.raises(Superseded):
            word()
    assert names(run) == []


def test_a_refusal_is_told_and_not_repeated(run: RunDirectory, files: Outage) -> None:
    desk = desk_of(run)
    files.refusal = PermissionDeniedError("no", service=Service("S", "a", "r"), resource="gs://b/r")
    record = record_of(run, desk)
    record.event("checkpoint", step=1)
    with pytest.raises(PermissionDeniedError):
        desk.flush()
    with pytest.raises(PermissionDeniedError):
        record.tick()


def test_a_full_disk_is_tried_again_until_it_has_room(run: RunDirectory, files: Outage) -> None:
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            files.refusal = None

    files.refusal = OSError(errno.ENOSPC, "No space left on device")
    desk = desk_of(run, wait=wait)
    record_of(run, desk).event("checkpoint", step=1)
    desk.flush()
    assert names(run) == ["checkpoint"]
    assert len(waited) == 3


def test_a_broken_disk_is_not(run: RunDirectory, files: Outage) -> None:
    files.refusal = OSError(errno.EIO, "Input/output error")
    desk = desk_of(run)
    record_of(run, desk).event("checkpoint", step=1)
    with pytest.raises(Unwritten, match="Input/output error"):
        desk.flush()


def test_a_request_to_stop_is_found_without_waiting_for_it(run: RunDirectory) -> None:
    desk = desk_of(run)
    record = record_of(run, desk)
    assert record.stop_requested() is None
    run.request_stop(StopRequest.NOW)
    record.stop_requested()
    desk.flush()
    record.stop_requested()
    desk.flush()
    assert record.stop_requested() is StopRequest.NOW


def test_a_transition_that_the_table_does_not_know_is_refused_at_once(run: RunDirectory) -> None:
    record = record_of(run, desk_of(run))
    with pytest.raises(ValueError, match="RUNNING -> QUEUED"):
        record.enter(RunState.QUEUED, "")


@pytest.mark.parametrize("error", [Unwritten("away"), PermissionDeniedError("no", service=Service("S", "a", "r"), resource="gs://b/r")])
def test_a_run_whose_directory_is_away_is_left_unfinished_for_the_next_supervisor(run: RunDirectory, error: Exception) -> None:
    done: list[str] = []

    def supervise() -> None:
        raise error

    code = watch_over(supervise, record_of(run, desk_of(run)), lambda: done.append("released"), lambda: done.append("cleared up"))
    assert (code, done) == (EXIT_UNFINISHED, ["released"])
    status = run.status()
    assert status is not None
    assert status.state is RunState.RUNNING


def test_any_other_error_of_the_supervisor_ends_the_run(run: RunDirectory) -> None:
    done: list[str] = []

    def supervise() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        watch_over(supervise, record_of(run, desk_of(run)), lambda: None, lambda: done.append("cleared up"))
    status = run.status()
    assert status is not None
    assert (status.state, status.reason) == (RunState.FAILED, "the supervisor failed: RuntimeError: a bug")
    assert done == ["cleared up"]
