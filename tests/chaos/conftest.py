"""Faults while a run trains: one emulated cluster for all of them, apart from the one of the integration tests.

`--chaos=full` runs every one; without it the ones that take longest, or show what another one shows too, are left out.
"""

import json
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

    def host_processes(self, worker: int, words: str) -> list[psutil.Process]:
        """Processes of one host of the slice whose command line holds `words`."""
        (uid,) = {path.name.rpartition("-w-")[0] for path in (self.home.state / "emulator" / "hosts").iterdir()}
        found = []
        for process in self.home.processes():
            try:
                if process.environ().get("PODLAUNCH_OWNER") == f"host-{uid}-w-{worker}" and words in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def start(self, name: str, *, until: int, steps: int = STEPS, every: int = 10) -> "Run":
        """A run that has done step `until`."""
        settings = (f"run.name={name}", f"trainer.steps={steps}", f"trainer.checkpoint_every={every}", "trainer.log_every=1")
        process = self.home.start(*launch_command(*settings, "cluster.head_lost_grace=20s"))
        run = Run(self.home.run(name), process)
        eventually(lambda: (status := run.directory.status()) is not None and status.step >= until, f"step {until} of {name}")
        return run


@dataclass(frozen=True)
class Run:
    directory: RunDirectory
    process: Any

    def end(self) -> str:
        """Wait for its end; what was printed."""
        output, _ = self.process.communicate(timeout=240)
        assert self.process.returncode == 0, output
        return str(output)

    def losses(self, attempt: int) -> dict[int, float]:
        rows = [json.loads(line) for line in (self.directory.path / "metrics.jsonl").read_text().splitlines()]
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


def hosts_folder(home: Home) -> Path:
    return home.state / "emulator" / "hosts"
