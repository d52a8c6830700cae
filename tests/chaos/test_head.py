"""What befalls a cluster's head while runs train on its slices: every run goes on from its checkpoint, and none is ever executed twice at a
time. A cluster of its own, with two slices and the default grace for a head that is away.
"""

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher.runs import RunState
from tests.chaos.conftest import Account, Cluster, Outcome, Run
from tests.integration.conftest import Home, eventually, make_home

pytestmark = pytest.mark.timeout(600)
STEPS = 80
EVERY = 10
BACK_S = 120.0
"""From the death of Ray's head to the next new step of every run."""
_CHILD = re.compile(r"launcher\.training\.child\0(?P<run>[^\0]+)\0--attempt\0(?P<attempt>\d+)\0")


@pytest.fixture(scope="module")
def fleet() -> Iterator[Cluster]:
    for home in make_home():
        yield Cluster(home, ("cluster.max_slices=2",))


@pytest.fixture(scope="module")
def expected(fleet: Cluster) -> Outcome:
    """Of a run to which nothing happened."""
    run = start(fleet, "undisturbed")
    run.end()
    return run.outcome()


def start(fleet: Cluster, name: str, *, until: int = 0) -> Run:
    run = fleet.launch(name, steps=STEPS, every=EVERY)
    if until:
        reaches(run, until)
    return run


def reaches(run: Run, step: int) -> None:
    run.until(lambda: step in run.losses(0) and step // EVERY * EVERY in run.checkpoints, f"step {step}")


def ray_of_the_head(home: Home) -> list[psutil.Process]:
    """Without the drivers of jobs: whether they end is what is to be seen."""
    return [process for process in carrying(home, "PODLAUNCH_HEAD") if "launcher.gang.supervisor" not in words(process)]


def carrying(home: Home, variable: str) -> list[psutil.Process]:
    found = []
    for process in home.processes():
        with contextlib.suppress(psutil.Error):
            if variable in process.environ():
                found.append(process)
    return found


def words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill(processes: list[psutil.Process]) -> float:
    """With SIGKILL; when, in seconds since the epoch."""
    assert processes
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return time.time()


def agent(home: Home) -> psutil.Process:
    return psutil.Process(json.loads((home.state / "clusters" / "local" / "process.json").read_text())["pid"])


class Watch:
    """Looks all the time which attempts of which runs have a training process alive."""

    def __init__(self) -> None:
        self.together: defaultdict[str, set[frozenset[int]]] = defaultdict(set)
        self.looks = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ending.wait(0.2):
            alive: defaultdict[str, set[int]] = defaultdict(set)
            for pid in filter(str.isdigit, os.listdir("/proc")):
                with contextlib.suppress(OSError):
                    match = _CHILD.search(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace"))
                    if match is not None:
                        alive[Path(match["run"]).name].add(int(match["attempt"]))
            for run, attempts in alive.items():
                self.together[run].add(frozenset(attempts))
            self.looks += 1


def check_never_twice(run: Run, watch: Watch, attempts: int) -> None:
    """By its processes, by its claims, and by the times of its steps."""
    name = run.directory.run_id
    assert watch.looks > 20
    assert watch.together[name] == {frozenset({attempt}) for attempt in range(attempts)}, "two attempts at a time, or one unseen"
    claims = [json.loads((run.directory.path / "claims" / f"{attempt}.json").read_text()) for attempt in range(attempts)]
    assert len({claim["holder"] for claim in claims}) == attempts
    rows = [row for row in run.directory.metrics() if "loss" in row]
    assert [row["attempt"] for row in rows] == sorted(row["attempt"] for row in rows)


def check_losses(run: Run, expected: Outcome, attempts: int) -> None:
    found = [run.losses(attempt) for attempt in range(attempts)]
    assert sorted({step for losses in found for step in losses}) == list(range(1, STEPS + 1)), "no gap"
    for losses in found:
        assert losses == {step: expected.losses[step] for step in losses}
    assert run.parameters() == expected.parameters
    for losses in found[1:]:
        assert min(losses) % EVERY == 1, "behind a checkpoint"
        assert min(losses) > 1, "not from the beginning"


def back_after(run: Run, killed: float, fault: str, account: Account) -> float:
    """Seconds from `killed` until the first step of the next attempt."""
    eventually(lambda: bool(run.losses(1)), f"attempt 1 of {run.directory.run_id}")
    took = float(min(row["time"] for row in run.directory.metrics() if row["attempt"] == 1 and "loss" in row) - killed)
    (lost,) = run.events("supervisor_lost")
    account.add(fault, seen=lost["time"] - killed, working=took)
    return took


def check_end(run: Run, expected: Outcome, watch: Watch) -> None:
    """SUCCEEDED after exactly one loss of its supervisor."""
    status = run.directory.status()
    assert status is not None
    assert (status.state, status.attempt) == (RunState.SUCCEEDED, 1)
    assert (status.recoveries.infrastructure, status.recoveries.total) == (1, 1), run.events("failure")
    assert len(run.events("supervisor_lost")) == 1
    check_losses(run, expected, attempts=2)
    check_never_twice(run, watch, attempts=2)


@pytest.mark.long
def test_two_runs_go_on_from_their_checkpoints_after_rays_head_was_killed(fleet: Cluster, expected: Outcome, account: Account) -> None:
    with Watch() as watch:
        runs = [start(fleet, name) for name in ("one", "two")]
        for run in runs:
            reaches(run, 13)
        slices = sorted(fleet.slices())
        assert len(slices) == 2
        killed = kill(ray_of_the_head(fleet.home))
        took = [back_after(run, killed, f"Ray's head killed, run {run.directory.run_id}", account) for run in runs]
        outputs = [run.end() for run in runs]
    assert max(took) < BACK_S
    for run, output in zip(runs, outputs, strict=True):
        check_end(run, expected, watch)
        assert "the supervisor of attempt 0 was lost" in output
    assert sorted(fleet.slices()) == slices, "hosts joined again; no slice was made anew"


@pytest.mark.long
def test_a_run_goes_on_after_its_supervisor_was_killed(fleet: Cluster, expected: Outcome, account: Account) -> None:
    with Watch() as watch:
        run = start(fleet, "unsupervised", until=13)
        killed = kill(fleet.supervisors(run))
        back_after(run, killed, "supervisor killed", account)
        run.end()
    check_end(run, expected, watch)


@pytest.mark.long
def test_a_killed_head_agent_costs_nothing_and_the_next_start_takes_its_ray_over(fleet: Cluster, expected: Outcome) -> None:
    run = start(fleet, "agentless", until=13)
    ray = {process for process in ray_of_the_head(fleet.home) if "gcs_server" in words(process) or "raylet/raylet" in words(process)}
    agent(fleet.home).send_signal(signal.SIGKILL)
    started = fleet.home.tpu("start")
    assert started.returncode == 0, started.stderr
    assert all(process.is_running() for process in ray)
    run.end()
    status = run.directory.status()
    assert status is not None
    assert (status.state, status.attempt, status.recoveries.total) == (RunState.SUCCEEDED, 0, 0)
    check_losses(run, expected, attempts=1)


@pytest.mark.long
def test_a_head_that_died_altogether_is_brought_back_by_the_next_start_and_its_run_goes_on(
    fleet: Cluster, expected: Outcome, account: Account
) -> None:
    with Watch() as watch:
        run = start(fleet, "headless", until=13)
        slices = sorted(fleet.slices())
        fleet.kill_head()
        output, _ = run.process.communicate(timeout=120)
        assert run.process.returncode == 1, output
        assert "the head of cluster 'local' is gone: `tpu start` brings it back" in output
        status = run.directory.status()
        assert status is not None
        assert status.state is RunState.RUNNING, "nobody has given it up"
        began = time.time()
        started = fleet.home.tpu("start")
        assert started.returncode == 0, started.stderr
        back_after(run, began, "head with its agent killed, from `tpu start` on", account)
        attached = fleet.home.tpu("train", "attach", "headless")
        assert attached.returncode == 0, attached.stdout
    check_end(run, expected, watch)
    assert sorted(fleet.slices()) == slices


@pytest.mark.long
def test_a_stopped_cluster_brings_no_run_back_unless_its_runs_were_kept(fleet: Cluster, expected: Outcome) -> None:
    home = fleet.home
    given_up = start(fleet, "given-up", until=13)
    stopped = home.tpu("stop", "-y")
    assert stopped.returncode == 0, stopped.stderr
    assert f"unfinished run, will be STOPPED: {given_up.directory.path}" in stopped.stdout
    output, _ = given_up.process.communicate(timeout=60)
    assert given_up.process.returncode == 100, output
    assert home.status("given-up").state is RunState.STOPPED
    assert home.tpu("start").returncode == 0

    kept = start(fleet, "kept", until=13)
    assert home.status("given-up").state is RunState.STOPPED, "no run comes back unasked"
    stopped = home.tpu("stop", "-y", "--keep-runs")
    assert stopped.returncode == 0, stopped.stderr
    kept.process.communicate(timeout=60)
    status = home.status("kept")
    assert (status.state, status.checkpoint) == (RunState.SUSPENDED, status.step), "it checkpointed first"
    assert f"SUSPENDED: {kept.directory.path}" in stopped.stdout
    assert home.processes() == []

    started = home.tpu("start", "max_slices=2")
    assert started.returncode == 0, started.stderr
    assert f"run {kept.directory.path} goes on" in started.stderr
    attached = home.tpu("train", "attach", "kept")
    assert attached.returncode == 0, attached.stdout
    assert home.status("kept").recoveries.total == 0
    found = {**kept.losses(0), **kept.losses(home.status("kept").attempt)}
    assert found == expected.losses
    assert kept.parameters() == expected.parameters
    assert min(kept.losses(home.status("kept").attempt)) == status.step + 1, "not a step was lost"
    assert home.status("given-up").state is RunState.STOPPED
