"""`tpu exec` and `tpu ssh` on the hosts of slices without Ray."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.integration.conftest import Home, eventually

TPU = str(Path(sys.executable).parent / "tpu")


def test_commands_and_shells_on_hosts(alone: Home) -> None:
    assert alone.tpu("emulator", "start", "--profile", "instant").returncode == 0
    started = alone.tpu("start", "--bare", "-y", "name=bare")  # one slice of 2 hosts of 4 chips
    assert started.returncode == 0, started.stderr

    found = alone.tpu("exec", "bare", "--", "sh", "-c", 'echo "$PODLAUNCH_HOME"; pwd')
    homes = {worker: [line for line in found.stdout.splitlines() if line.startswith(f"host {worker}: ")] for worker in (0, 1)}
    assert (found.returncode, found.stderr) == (0, "")
    for worker, lines in homes.items():
        assert [f"-w-{worker}/opt/podlaunch" in lines[0], lines[1].endswith(f"-w-{worker}/home"), len(lines)] == [True, True, 2]

    failed = alone.tpu("exec", "bare-0", "--", "sh", "-c", 'case "$PODLAUNCH_HOME" in *-w-1/*) echo broken >&2; exit 7;; esac')
    assert (failed.returncode, failed.stdout, failed.stderr) == (7, "", "host 1: broken\n")

    script = 'echo "$PODLAUNCH_HOME"\nexit 3\n'
    shell = subprocess.run(
        [TPU, "ssh", "bare", "--host", "1"], env={**alone.env, "SHELL": "/bin/sh"}, input=script, capture_output=True, text=True, timeout=60
    )
    assert (shell.returncode, shell.stdout.strip()) == (3, homes[1][0].removeprefix("host 1: "))

    check_end(alone, signal.SIGINT, 130)
    check_end(alone, signal.SIGKILL, -signal.SIGKILL)  # nobody is left here to end anything
    assert json.loads(alone.tpu("status", "--json").stdout)[0]["slices"][0]["state"] == "READY"


def check_end(home: Home, number: signal.Signals, code: int) -> None:
    command = home.start(TPU, "exec", "bare", "--", "sh", "-c", "echo up; exec sleep 3210")
    assert command.stdout is not None
    assert {command.stdout.readline(), command.stdout.readline()} == {"host 0: up\n", "host 1: up\n"}
    eventually(lambda: len(sleepers(home)) == 2, "both shells are what they were to become", limit=30)
    command.send_signal(number)
    assert command.wait(30) == code
    command.stdout.close()
    eventually(lambda: not sleepers(home), "the command has ended on both hosts", limit=30)


def sleepers(home: Home) -> list[psutil.Process]:
    found = []
    for process in home.processes():
        try:
            if process.cmdline() == ["sleep", "3210"]:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found
