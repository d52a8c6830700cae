"""Faults while runs train: an emulated cluster for all that befalls hosts, one for slices, both apart from that of the integration tests.

`--chaos=full` runs every test, with `-n 2 --dist loadfile` two files at a time; without it the ones that take longest, or show what another
one shows too, are left out. What each fault cost is printed at the end.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.local import ask_emulator
from launcher.runs import Recoveries, RunDirectory, RunState
from tests.integration.conftest import Home, eventually, launch_command, make_home

STEPS = 40
SMALL = ("trainer.seq_len=32", "trainer.eval_batches=1")


@dataclass(frozen=True)
class Mended:
    """What a fault has cost its run, in seconds since it struck."""

    fault: str
    seen: float | None
    """Until the run was told to fail, or the slice to go; None: nothing had begun yet that could fail."""
    working: float
    """Until the first step on what took the place of what was lost."""


@dataclass(frozen=True)
class Outcome:
    """What a run comes to."""

    losses: dict[int, float]
    """By step."""
    parameters: str
    """A checksum."""


_PROPERTY = "mended"


class Account:
    """Where a test writes down how long it took."""

    def __init__(self, properties: list[tuple[str, object]]) -> None:
        self._properties = properties

    def add(self, fault: str, *, seen: float | None, working: float) -> None:
        self._properties.append((_PROPERTY, dataclasses.asdict(Mended(fault, seen, working))))

    @contextlib.contextmanager
    def recovery(self, fault: str, run: "Run", attempt: int) -> Iterator[None]:
        """The fault strikes in the block; then its run does the first step of `attempt`."""
        struck = time.time()
        yield
        run.until(lambda: run.first_step(attempt) is not None, f"attempt {attempt}")
        working = run.first_step(attempt)
        (failed,) = [event["time"] for event in run.events("failure") if event["attempt"] == attempt - 1]
        assert working is not None
        self.add(fault, seen=failed - struck, working=working - struck)


@pytest.fixture(scope="session")
def chaos_seed(request: pytest.FixtureRequest) -> int:
    """Of the first random schedule; the others follow it."""
    given: int | None = request.config.getoption("--chaos-seed")
    return random.randrange(1 << 16) if given is None else given


@pytest.fixture
def account(request: pytest.FixtureRequest) -> Account:
    return Account(request.node.user_properties)  # they come with the test's report, also from another process


_mended: list[Mended] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        _mended.extend(Mended(**value) for name, value in report.user_properties if name == _PROPERTY and isinstance(value, dict))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = _mended
    if not lines:
        return
    width = max(len(line.fault) for line in lines)
    terminalreporter.section("seconds from the fault")
    terminalreporter.write_line(f"{'':{width}}  {'seen':>6}  {'working':>7}")
    for line in lines:
        seen = "" if line.seen is None else f"{line.seen:.1f}"
        terminalreporter.write_line(f"{line.fault:{width}}  {seen:>6}  {line.working:7.1f}")


@dataclass(frozen=True)
class Cluster:
    """The user's home with a cluster in it whose graces are short, and where slices may die young."""

    home: Home
    settings: tuple[str, ...] = ("cluster.head_lost_grace=20s", "cluster.churn_short=1s")

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

    def children(self, run: "Run", attempt: int) -> dict[int, psutil.Process]:
        """The training processes of a run's attempt, by host."""

        def told() -> list[int]:
            return [pid for event in run.events("processes") if event["attempt"] == attempt for pid in event["pids"]]

        run.until(lambda: bool(told()), f"the processes of attempt {attempt}")
        return {host: psutil.Process(pid) for host, pid in enumerate(told())}

    def supervisors(self, run: "Run") -> list[psutil.Process]:
        """The driver of the run's job, and the shell that is its parent where there is one."""
        found = []
        for process in self.home.processes():
            with contextlib.suppress(psutil.Error):
                words = " ".join(process.cmdline())
                if "launcher.gang.supervisor" in words and run.directory.url in words:
                    found.append(process)
        return found

    @property
    def storage(self) -> str:
        """Where the emulated Cloud Storage answers."""
        found = json.loads((self.home.state / "emulator" / "endpoint.json").read_text())
        return str(found["storage"])

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

    def beside(self, child: psutil.Process, words: str) -> psutil.Process:
        """The one process on a training process's host whose command line holds `words`."""
        owner = child.environ()["PODLAUNCH_OWNER"]
        (found,) = [process for process in self.home.processes() if _is(process, owner, words)]
        return found

    def preempt(self, slice_name: str = "", *, notice: float) -> str:
        """Take a slice back, by default the only one; its name."""
        (name,) = [slice_name] if slice_name else self.slices()
        self.admin("POST", "/preempt", node=name, notice=notice)
        return name

    def launch(self, name: str, *more: str, steps: int = STEPS, every: int = 10) -> "Run":
        """A run, as soon as its command has started."""
        settings = (f"run.name={name}", f"trainer.steps={steps}", f"trainer.checkpoint_every={every}", "trainer.log_every=1", *SMALL)
        return Run(self.home.run(name), self.home.start(*launch_command(*settings, *self.settings, *more)))

    def start(self, name: str, *more: str, until: int, steps: int = STEPS, every: int = 10) -> "Run":
        """A run that has done step `until`."""
        run = self.launch(name, *more, steps=steps, every=every)
        run.until(lambda: run.step >= until, f"step {until}")
        return run


def _is(process: psutil.Process, owner: str, words: str) -> bool:
    try:
        return process.environ().get("PODLAUNCH_OWNER") == owner and words in " ".join(process.cmdline())
    except psutil.Error:
        return False


def _follows(words: list[str], *options: str) -> bool:
    """Whether the command line holds each of these options with its value."""
    given = set(itertools.pairwise(words))
    return all(pair in given for pair in zip(options[::2], options[1::2], strict=True))


@dataclass(frozen=True)
class Run:
    directory: RunDirectory
    process: Any

    @property
    def step(self) -> int:
        status = self.directory.status()
        return 0 if status is None else status.step

    @property
    def phase(self) -> str:
        status = self.directory.status()
        return "" if status is None else status.phase

    @property
    def checkpoints(self) -> set[int]:
        """Those that it has told of."""
        return {event["step"] for event in self.events("checkpoint")}

    @property
    def restored(self) -> list[int]:
        """The steps that its attempts went on from, those that began at 0 left out."""
        return [event["step"] for event in self.events("restored")]

    @property
    def slices(self) -> list[str]:
        """Those that it holds."""
        status = self.directory.status()
        return [] if status is None else status.slices

    def first_step(self, attempt: int) -> float | None:
        """When it did the first step of an attempt, seconds since the epoch."""
        return next((event["time"] for event in self.events("first_step") if event["attempt"] == attempt), None)

    def end(self) -> str:
        """Wait for its end; what was printed."""
        output, _ = self.process.communicate(timeout=240)
        assert self.process.returncode == 0, output
        return str(output)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something that comes before its end."""

        def done() -> bool:
            if condition():
                return True
            assert self.process.poll() is None, f"{self.directory.run_id} ended before {what}: {self.process.communicate()[0]}"
            return False

        eventually(done, f"{what} of {self.directory.run_id}")

    def parameters(self) -> str:
        """Of the model that it has made: the checksum of its weights as they are, which the file holds in the compute type, float32."""
        weights = self.directory.files.read("export/model.safetensors")
        assert weights is not None
        return hashlib.sha256(weights).hexdigest()

    def outcome(self) -> Outcome:
        return Outcome(self.losses(0), self.parameters())

    def reaches(self, step: int, attempt: int) -> None:
        self.until(lambda: step in self.losses(attempt), f"step {step} of attempt {attempt}")

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
def undisturbed(cluster: Cluster) -> Outcome:
    """Of a run to which nothing happened."""
    run = cluster.start("undisturbed", until=1)
    run.end()
    return run.outcome()


def check_end(run: Run, undisturbed: Outcome, **recoveries: int) -> None:
    """It SUCCEEDED after so many recoveries of each cause; every step of every attempt came out as in the run to which nothing happened,
    none is missing, and so did the model, bit by bit.
    """
    status = run.directory.status()
    assert status is not None
    assert (status.state, status.recoveries) == (RunState.SUCCEEDED, Recoveries(**recoveries)), run.events("failure")
    attempts = [run.losses(attempt) for attempt in range(status.attempt + 1)]
    assert {step for losses in attempts for step in losses} == set(undisturbed.losses)
    for losses in attempts:
        assert losses == {step: undisturbed.losses[step] for step in losses}
    assert run.parameters() == undisturbed.parameters
