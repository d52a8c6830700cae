"""Faults while a run trains: one emulated cluster for all of them, apart from the one of the integration tests.

`--chaos=full` runs every one; without it the ones that take longest, or show what another one shows too, are left out.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.local import ask_emulator
from launcher.runs import RunDirectory
from tests.integration.conftest import Home, eventually, launch_command, make_home

STEPS = 40
SMALL = ("trainer.seq_len=32", "trainer.eval_batches=1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--chaos") == "full":
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="a long one: run with --chaos=full"))


@dataclass(frozen=True)
class Cluster:
    """The user's home with a cluster `local` in it, whose grace without a head is short."""

    home: Home

    def admin(self, verb: str, path: str, **values: Any) -> Any:
        """What `tpu emulator` asks, without the start of a process."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PODLAUNCH_STATE_DIR", str(self.home.state))
            return ask_emulator(verb, path, values if verb == "POST" else None)

    def slices(self) -> list[str]:
        return [node["name"].rpartition("/")[2] for node in self.admin("GET", "/nodes")]

    def disk(self, worker: int) -> Path:
        """Of a host of the only slice."""
        (disk,) = (self.home.state / "emulator" / "hosts").glob(f"*-w-{worker}")
        return disk

    def host_process(self, worker: int, words: str) -> psutil.Process:
        """The one process of that host whose command line holds `words`."""
        (found,) = [process for process in self.home.processes() if _is(process, f"host-{self.disk(worker).name}", words)]
        return found

    def kill_raylet(self, worker: int) -> None:
        self.host_process(worker, "raylet/raylet ").kill()

    def kill_agents(self) -> None:
        for worker in range(2):
            self.host_process(worker, "cluster.vm.host_agent").kill()

    def kill_head(self) -> None:
        """With everything that runs on it; the emulated cloud and the hosts live on."""
        for process in self.home.processes():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("PODLAUNCH_OWNER", "").startswith("head-"):
                    process.kill()

    def preempt(self, *, notice: float) -> str:
        """Take the only slice back; its name."""
        (name,) = self.slices()
        self.admin("POST", "/preempt", node=name, notice=notice)
        return name

    def start(self, name: str, *, until: int, steps: int = STEPS, every: int = 10) -> "Run":
        """A run that has done step `until`."""
        settings = (f"run.name={name}", f"trainer.steps={steps}", f"trainer.checkpoint_every={every}", "trainer.log_every=1", *SMALL)
        process = self.home.start(*launch_command(*settings, "cluster.head_lost_grace=20s"))
        run = Run(self.home.run(name), process)
        eventually(lambda: (status := run.directory.status()) is not None and status.step >= until, f"step {until} of {name}")
        return run


def _is(process: psutil.Process, owner: str, words: str) -> bool:
    try:
        return process.environ().get("PODLAUNCH_OWNER") == owner and words in " ".join(process.cmdline())
    except psutil.Error:
        return False


@dataclass(frozen=True)
class Run:
    directory: RunDirectory
    process: Any

    def end(self) -> str:
        """Wait for its end; what was printed."""
        output, _ = self.process.communicate(timeout=240)
        assert self.process.returncode == 0, output
        return str(output)

    def reaches(self, step: int, attempt: int) -> None:
        eventually(lambda: step in self.losses(attempt), f"step {step} of attempt {attempt}")

    def losses(self, attempt: int) -> dict[int, float]:
        rows = list(self.directory.metrics())
        return {row["step"]: row["loss"] for row in rows if row["attempt"] == attempt and "loss" in row}

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.directory.events() if event["event"] == name]


@pytest.fixture(scope="package")
def home() -> Iterator[Home]:
    yield from make_home()


@pytest.fixture(scope="package")
def cluster(home: Home) -> Cluster:
    return Cluster(home)


@pytest.fixture(scope="package")
def undisturbed(cluster: Cluster) -> dict[int, float]:
    """The losses of a run to which nothing happened."""
    run = cluster.start("undisturbed", until=1)
    run.end()
    return run.losses(0)
