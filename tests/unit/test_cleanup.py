"""Poisoned hosts: real processes that hold files where a host has its devices."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.vm.cleanup import clean_host, device_holders

HOLD = """
import signal, sys, time
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
held = open(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""
Hold = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def hold() -> Iterator[Hold]:
    started: list[subprocess.Popen[bytes]] = []

    def start(path: Path, manner: str = "") -> "subprocess.Popen[bytes]":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), manner], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(20)
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize("device", ["accel0", "vfio/7"])
def test_who_holds_a_device_is_ended_and_logged(tmp_path: Path, hold: Hold, caplog: pytest.LogCaptureFixture, device: str) -> None:
    holder = hold(tmp_path / "dev" / device)
    assert clean_host(tmp_path / "dev", tmp_path) == [holder.pid]
    assert not psutil.pid_exists(holder.pid)
    assert f"process {holder.pid} holds an accelerator" in caplog.text
    assert device in caplog.text, "the command line says what it was"


def test_who_does_not_heed_sigterm_is_killed(tmp_path: Path, hold: Hold, caplog: pytest.LogCaptureFixture) -> None:
    holder = hold(tmp_path / "dev" / "accel3", "deaf")
    clean_host(tmp_path / "dev", tmp_path, grace=0.2)
    assert not psutil.pid_exists(holder.pid)
    assert "does not heed SIGTERM" in caplog.text


def test_other_files_other_hosts_and_spared_processes_are_left_alone(tmp_path: Path, hold: Hold) -> None:
    other_file, other_host, ours = hold(tmp_path / "dev" / "null"), hold(tmp_path / "other" / "accel0"), hold(tmp_path / "dev" / "accel0")
    assert [process.pid for process in device_holders(tmp_path / "dev")] == [ours.pid]
    assert clean_host(tmp_path / "dev", tmp_path, spare=[ours.pid]) == []
    assert [process.poll() for process in (other_file, other_host, ours)] == [None] * 3


def test_a_stale_lock_file_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clean_host(tmp_path / "dev", tmp_path)
    assert caplog.text == ""
    (tmp_path / "libtpu_lockfile").touch()
    clean_host(tmp_path / "dev", tmp_path)
    assert not (tmp_path / "libtpu_lockfile").exists()
    assert "libtpu_lockfile" in caplog.text
