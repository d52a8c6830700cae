"""One emulated cluster for the whole session, used the way a user uses it: through the commands, from a folder of the user's own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.runs import RunDirectory, RunStatus
from tests.compilations import share_compilations

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 280.0
SECRET = "a-secret-that-must-not-be-written-down"


@dataclass(frozen=True)
class Home:
    """A user's folder and state of its own."""

    folder: Path
    state: Path

    @property
    def env(self) -> dict[str, str]:
        own = {"PODLAUNCH_STATE_DIR": str(self.state), "PODLAUNCH_CACHE_DIR": str(self.folder.parent / "cache"), "NO_COLOR": "1"}
        own["HF_TOKEN"] = SECRET
        return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | own

    def start(self, *command: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            # A shell's background jobs ignore Ctrl-C, and what they start inherits that; a user's command does not.
            ("env", "--default-signal=INT", *command),
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def call(self, *command: str, limit: float = LIMIT_S) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit, check=False
        )

    def launch(self, *overrides: str, limit: float = LIMIT_S) -> "subprocess.CompletedProcess[str]":
        return self.call(*launch_command(*overrides), limit=limit)

    def tpu(self, *arguments: str, limit: float = LIMIT_S) -> "subprocess.CompletedProcess[str]":
        return self.call(str(Path(sys.executable).parent / "tpu"), *arguments, limit=limit)

    def run(self, name: str) -> RunDirectory:
        return RunDirectory(self.folder / "runs" / name)

    def status(self, name: str) -> RunStatus:
        status = self.run(name).status()
        assert status is not None
        return status

    def marks(self, process: psutil.Process) -> bool:
        """Whether the process belongs to this home: our daemons and all that descend from them carry its state directory."""
        try:
            return process.environ().get("PODLAUNCH_STATE_DIR") == str(self.state)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            return False

    def processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if process.pid != os.getpid() and self.marks(process)]


def training_process(run: RunDirectory, host: int) -> psutil.Process:
    """Of the run's newest attempt."""
    pids = [event["pids"] for event in run.events() if event["event"] == "processes"][-1]
    return psutil.Process(pids[host])


def launch_command(*overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "launch.py"), *overrides]


def eventually(condition: Callable[[], bool], what: str, limit: float = LIMIT_S) -> None:
    """Wait for another process's doing, which tells nobody."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit:.0f} s: {what}"
        time.sleep(0.05)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def home() -> Iterator[Home]:
    yield from make_home()


def make_home() -> Iterator[Home]:
    """The user's folder holds a conf/, a launcher.py and a cluster.py of the user's own, none of which may matter."""
    base = Path(tempfile.mkdtemp(prefix="podlaunch-test-"))
    folder = base / "work"
    (folder / "conf").mkdir(parents=True)
    (folder / "conf" / "config.yaml").write_text("server: {port: 80}\n")
    for name in ("launcher", "cluster", "conf"):
        (folder / f"{name}.py").write_text("raise RuntimeError('shadowed')\n")
    share_compilations(base / "cache")
    made = Home(folder, base / "state")
    yield made
    stopped = made.tpu("stop", "-y", limit=120)
    left = made.processes()
    for process in left:
        process.send_signal(signal.SIGKILL)
    if stopped.returncode == 0 and not left:
        shutil.rmtree(base)
    assert stopped.returncode == 0, f"{stopped.stdout}{stopped.stderr} (state kept in {base})"
    assert not left, f"left behind: {left} (state kept in {base})"


@pytest.fixture
def alone() -> Iterator[Home]:
    """A home of the test's own, for what would disturb the others."""
    base = Path(tempfile.mkdtemp(prefix="podlaunch-test-"))
    (base / "work").mkdir()
    share_compilations(base / "cache")
    home = Home(base / "work", base / "state")
    yield home
    home.tpu("stop", "-y", limit=120)
    left = home.processes()
    for process in left:
        process.send_signal(signal.SIGKILL)
    shutil.rmtree(base)
