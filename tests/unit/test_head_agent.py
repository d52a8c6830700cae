"""What the head's agent starts: real processes in Ray's place."""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import processes
from cluster.processes import ProcessRecord
from cluster.vm import head_agent
from cluster.vm.companion import Beside
from cluster.vm.head_agent import HEAD_VARIABLE, HeadSettings, head_environment, start_companion, start_ray

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
TELL = (
    "import json; from cluster.vm.companion import Beside; b = Beside.from_environment(); print(json.dumps([b.cluster, b.url]), flush=True)"
)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HeadSettings:
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(head_agent, "head_command", lambda _: SLEEP)
    temp_dir = tmp_path / "ray"
    temp_dir.mkdir()
    return HeadSettings("c", "c-head", "127.0.0.9", "127.0.0.9", 1, 8265, 2, 3, str(tmp_path / "token"), "", str(temp_dir))


@pytest.fixture
def started(settings: HeadSettings) -> Iterator[list[ProcessRecord]]:
    records: list[ProcessRecord] = []
    yield records
    processes.kill_members(settings.temp_dir, HEAD_VARIABLE)
    for record in records:
        processes.kill_members(record.marker)
        processes.reap(record)


def test_nothing_of_a_ray_before_stands_in_the_way_of_the_next(
    settings: HeadSettings, started: list[ProcessRecord], tmp_path: Path
) -> None:
    driver = processes.spawn(SLEEP, marker="a-driver", env=head_environment(settings), log=tmp_path / "out", cwd=tmp_path)
    another = head_environment(dataclasses.replace(settings, temp_dir="/another"))
    bystander = processes.spawn(SLEEP, marker="a-bystander", env=another, log=tmp_path / "out", cwd=tmp_path)
    started += [driver, bystander]
    address = Path(settings.temp_dir) / "ray_current_cluster"
    address.write_text("127.0.0.9:1")
    started.append(start_ray(settings, tmp_path))
    assert [record.alive() for record in started] == [False, True, True], "a job's driver, of another group than its Ray, ends with it"
    assert not address.exists(), "with it Ray takes the raylets of hosts on this machine for a head that runs"
    assert psutil.Process(started[-1].pid).environ()[HEAD_VARIABLE] == settings.temp_dir


def test_a_companion_is_told_where_its_head_answers(settings: HeadSettings, started: list[ProcessRecord], tmp_path: Path) -> None:
    settings = dataclasses.replace(settings, companion=["-c", TELL])
    started.append(start_companion(settings, tmp_path))
    log = tmp_path / "state" / "logs" / "head-c.out"
    deadline = time.monotonic() + 60
    while not log.read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.02)  # another process's file
    assert json.loads(log.read_text()) == ["c", settings.dashboard_url]
    assert settings.dashboard_url == Beside("c", "http://127.0.0.9:8265", tmp_path).url


def test_settings_of_a_head_from_before_there_were_companions_have_none(settings: HeadSettings) -> None:
    values = json.loads(settings.to_json())
    del values["companion"]
    assert HeadSettings.from_json(json.dumps(values)).companion == []
