"""What the watch makes of the metadata server's words."""

import json
from pathlib import Path

import pytest

from cluster.errors import ClusterError
from cluster.vm.host_dir import Notice, NoticeKind, read_notice, write_notice
from cluster.vm.notices import UPCOMING_INTERVAL_S, NoticeWatch

QUIET = {"instance/preempted": "FALSE", "instance/maintenance-event": "NONE"}
UPCOMING = "instance/upcoming-maintenance?recursive=true"


class Server:
    """A metadata server: values, or an error in their place."""

    def __init__(self) -> None:
        self.values: dict[str, str] = dict(QUIET)
        self.down = False
        self.asked: list[str] = []

    def __call__(self, path: str) -> str:
        self.asked.append(path)
        if self.down or path not in self.values:
            raise ClusterError("503")
        return self.values[path]


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(server: Server, clock: Clock) -> NoticeWatch:
    return NoticeWatch(server, clock, 30.0)


def upcoming(**values: str) -> str:
    return json.dumps({"type": "SCHEDULED", "canReschedule": "TRUE", **values})


def test_nothing_announced_is_no_notice(watch: NoticeWatch) -> None:
    assert watch.poll() is None


def test_a_preemption_is_latched_whatever_comes_after(watch: NoticeWatch, server: Server, clock: Clock) -> None:
    server.values["instance/preempted"] = "TRUE\n"
    notice = watch.poll()
    assert notice == Notice(NoticeKind.PREEMPTED, clock.now, clock.now + 30)
    clock.now += 10
    server.values.update(QUIET)
    assert watch.poll() is notice
    server.down = True
    assert watch.poll() is notice


@pytest.mark.parametrize("value", ["NONE", "", "MIGRATE_ON_HOST_MAINTENANCE"])
def test_events_that_do_not_end_the_host_are_none(watch: NoticeWatch, server: Server, value: str) -> None:
    server.values["instance/maintenance-event"] = value
    assert watch.poll() is None


def test_maintenance_keeps_its_first_deadline_and_can_be_taken_back(watch: NoticeWatch, server: Server, clock: Clock) -> None:
    server.values["instance/maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    notice = watch.poll()
    assert notice == Notice(NoticeKind.MAINTENANCE, clock.now, clock.now + 30)
    clock.now += 5
    assert watch.poll() is notice
    server.values["instance/maintenance-event"] = "NONE"
    assert watch.poll() is None


def test_a_server_that_stumbles_changes_nothing_and_is_told_of_once(
    watch: NoticeWatch, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.values["instance/maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    notice = watch.poll()
    server.down = True
    assert [watch.poll() for _ in range(3)] == [notice] * 3
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("announced", "counts"),
    [
        (upcoming(windowStartTime="2023-11-14T22:13:50Z", maintenanceStatus="PENDING"), True),  # 30 s after the clock's beginning
        (upcoming(window_start_time="2023-11-14T22:13:50+00:00", maintenance_status="PENDING"), True),
        (upcoming(windowStartTime="2023-11-20T00:00:00Z", maintenanceStatus="PENDING"), False),
        (upcoming(windowStartTime="2023-11-20T00:00:00Z", maintenanceStatus="ONGOING"), True),
        ('{ "error": "no notifications have been received yet, try again later" }', False),
        ("no JSON", False),
        ('["no", "object"]', False),
        (upcoming(windowStartTime="soon"), False),
    ],
)
def test_announced_maintenance_counts_when_its_window_opens(watch: NoticeWatch, server: Server, announced: str, counts: bool) -> None:
    server.values[UPCOMING] = announced
    notice = watch.poll()
    assert (notice is not None and notice.kind is NoticeKind.MAINTENANCE) is counts
    assert watch.poll() is notice, "the same for as long as nothing changes"


def test_announcements_are_asked_for_once_a_minute(watch: NoticeWatch, server: Server, clock: Clock) -> None:
    for _ in range(120):
        watch.poll()
        clock.now += 1
    assert server.asked.count(UPCOMING) == 120 / UPCOMING_INTERVAL_S


def test_a_notice_reaches_whoever_reads_the_hosts_folder(tmp_path: Path) -> None:
    assert read_notice(tmp_path) is None
    notice = Notice(NoticeKind.PREEMPTED, 1.5, 31.5)
    write_notice(tmp_path, notice)
    assert read_notice(tmp_path) == notice
    write_notice(tmp_path, None)
    assert read_notice(tmp_path) is None
