"""Long-lived processes of this machine: started apart from the terminal, found again, and ended whole.

A process is known by its id and its start time, so that a reused id is never taken for it. Everything that descends from it is known
by a marker in its environment, which even a process that left its session or lost its parents keeps.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

MARKER = "PODLAUNCH_OWNER"
"""The environment variable that says to which daemon or emulated host a process belongs."""


@dataclass(frozen=True)
class ProcessRecord:
    """A process as it is written into a state file."""

    pid: int
    started: float
    """Seconds since the epoch, as psutil gives it."""
    marker: str

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ProcessRecord":
        return cls(int(values["pid"]), float(values["started"]), str(values["marker"]))

    def alive(self) -> bool:
        """Whether that very process still runs (a zombie does not)."""
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 0.05 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def spawn(argv: Sequence[str], *, marker: str, env: Mapping[str, str], log: Path, cwd: Path) -> ProcessRecord:
    """Start `argv` in a session of its own, its output appended to `log`. The caller's terminal and Ctrl-C do not reach it."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=cwd,
            env={**env, MARKER: marker},
            start_new_session=True,
        )
    record = ProcessRecord(process.pid, psutil.Process(process.pid).create_time(), marker)
    # Reaped by whoever waits for it; the Popen object must not warn when it is collected while the process lives on.
    process.returncode = 0
    return record


def reap(record: ProcessRecord) -> None:
    """Collect the exit status when the process is a dead child of ours, so that no zombie stays."""
    try:
        os.waitpid(record.pid, os.WNOHANG)
    except ChildProcessError:
        return


def members(marker: str, variable: str = MARKER) -> Iterator[psutil.Process]:
    """Every living process of this user, but this one, that carries `marker` in that environment variable."""
    own = os.getuid()
    wanted = f"{variable}={marker}".encode()
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.uids().real != own:
                continue
            environ = Path(f"/proc/{process.pid}/environ").read_bytes()
            if wanted in environ.split(b"\0") and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended while we looked, or is not ours


def end(
    record: ProcessRecord,
    *,
    grace: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """End the process and all that carry its marker: SIGTERM to the first, SIGKILL to all that is left after `grace` seconds."""
    if record.alive():
        os.kill(record.pid, signal.SIGTERM)
        deadline = clock() + grace
        while record.alive() and clock() < deadline:
            reap(record)
            sleep(0.05)
    kill_members(record.marker, clock=clock, sleep=sleep)
    reap(record)


def kill_members(
    marker: str,
    variable: str = MARKER,
    *,
    timeout: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """SIGKILL every process that carries `marker` in that variable, again until none is left: one may fork while it is being killed."""
    deadline = clock() + timeout
    while processes := list(members(marker, variable)):
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        if clock() > deadline:
            raise TimeoutError(f"processes {[p.pid for p in processes]} of {marker} do not end")
        psutil.wait_procs(processes, timeout=0.5)
        sleep(0)
