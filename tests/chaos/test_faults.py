"""What befalls the processes of a run, its disk, its memory and its storage: a run that goes on ends with exactly the model of the run to
which nothing happened, and one that cannot go on says why and keeps its last good checkpoint.

Every fault is a real one: a signal, a limit of the kernel's, a full disk, a service that does not answer.
"""

import contextlib
import random
import re
import resource
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.storage import Bucket
from launcher.gang.desk import ANSWER_LIMIT_S
from launcher.runs import RunDirectory, RunState
from launcher.training.manifest import verify
from launcher.training.storage import LocalStorage
from tests.chaos.conftest import STEPS, Account, Cluster, Outcome, Run, check_end
from tests.integration.conftest import ROOT, eventually, launch_command

pytestmark = pytest.mark.timeout(600)
PLAIN = "run.spares=false"
"""Which processes train is then told by their command lines."""
HANG = "run.hang.floor=20s"
AWAY_S = 30.0
SCRIPT_STEPS = 200
FAILED = 100
"""The exit code of a command whose run has failed."""


def strike(processes: Mapping[int, psutil.Process]) -> None:
    """All of them at once."""
    assert processes
    for process in processes.values():
        process.kill()


def limit(process: psutil.Process, what: int, most: int) -> None:
    """From now on; what it has got already it keeps."""
    process.rlimit(what, (most, resource.RLIM_INFINITY))


def raise_in(process: psutil.Process) -> None:
    """The next line that it writes into a file raises OSError: process 0 writes one a step."""
    limit(process, psutil.RLIMIT_FSIZE, 1)


def failures(run: Run) -> list[tuple[int, str, str]]:
    """Attempt, number of the host and cause of each."""
    return [(event["attempt"], event["host"].rpartition("/")[2], event["cause"]) for event in run.events("failure")]


def fails(run: Run) -> str:
    """Wait for its end, which is no good one; what was printed."""
    output, _ = run.process.communicate(timeout=240)
    assert run.process.returncode == FAILED, output
    status = run.directory.status()
    assert status is not None
    assert status.state is RunState.FAILED
    return str(output)


def check_last_good(run: Run) -> None:
    """All checkpoints that are there are whole, and the newest is the one that it told of last."""
    place = LocalStorage(run.directory.path / "checkpoints")
    found = sorted(int(name) for name in place.names() if name.isdecimal())
    assert found[-1] == max(run.checkpoints)
    assert [verify(place, str(step)) for step in found] == [None] * len(found)


def test_one_run_outlives_a_kill_in_its_first_compilation_two_at_once_one_while_it_recovers_an_exception_and_a_hang(
    cluster: Cluster, undisturbed: Outcome, account: Account
) -> None:
    run = cluster.launch("faulted", PLAIN, HANG, "run.budget.application=1")
    run.until(lambda: run.phase == "compiling", "compilation")
    with account.recovery("process killed in the first compilation", run, attempt=1):
        cluster.children(run, 0)[1].kill()
    slices = cluster.slices()
    assert run.losses(0) == {}

    run.reaches(13, attempt=1)
    strike(cluster.children(run, 1))
    run.until(lambda: 1 in cluster.children(run, 2), "the next process")
    with account.recovery("process killed while its run recovered", run, attempt=3):
        cluster.children(run, 2)[1].kill()
    assert run.losses(2) == {}

    run.reaches(14, attempt=3)
    with account.recovery("exception in one process", run, attempt=4):
        raise_in(cluster.children(run, 3)[0])

    run.reaches(24, attempt=4)
    with account.recovery("process stopped, hung for 20 s", run, attempt=5):
        cluster.children(run, 4)[1].suspend()

    run.end()
    check_end(run, undisturbed, infrastructure=4, application=1)
    found = failures(run)
    assert [cause for _, _, cause in found] == ["infrastructure"] * 3 + ["application", "infrastructure"]
    assert [host for attempt, host, _ in found if attempt != 1] == ["1", "1", "0", "1"]
    *_, exception, hang = run.events("failure")
    assert exception["error"] == "OSError: [Errno 27] File too large"
    assert "hung: no progress for" in hang["error"]
    stacks = [(run.directory.path / "logs" / "4" / f"host-{host}.stacks").read_text() for host in range(2)]
    assert all("MainThread" in one for one in stacks)
    assert "is stopped" in stacks[1]
    assert cluster.slices() == slices, "the machines are well"


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[], None]]:
    """A disk of so many bytes, mounted there; the answer makes it four times as large."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(folder), "-o"]
    made = subprocess.run([*mount, f"size={size}"], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        folder.rmdir()
        pytest.skip(f"needs the right to mount a tmpfs: {made.stderr.strip()}")

    def grow() -> None:
        subprocess.run([*mount, f"remount,size={4 * size}"], check=True)

    try:
        yield grow
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_full_ends_the_run_with_its_last_checkpoint_in_place_and_it_goes_on_from_there(
    cluster: Cluster, undisturbed: Outcome
) -> None:
    one = cluster.home.run("undisturbed").path / "checkpoints" / str(STEPS)
    size = sum(path.stat().st_size for path in one.rglob("*") if path.is_file())
    with small_disk(cluster.home.run("crowded").path / "checkpoints", size * 3 // 2) as grow:  # there is room for one of them
        run = cluster.launch("crowded", PLAIN)
        output = fails(run)
        lines = [line for line in output.splitlines() if line.startswith("failure ")]
        assert len(lines) == 1, output
        assert "could not be written" in lines[0]
        assert "(the last good one is 10): No space left on device; free space or repair the storage, then go on" in lines[0]
        check_last_good(run)
        grow()
        again = cluster.launch("crowded", PLAIN, "run.resume=true")
        again.end()
        assert again.restored == [10]
        check_end(again, undisturbed)


def test_a_loss_that_is_no_number_ends_the_run_with_its_step_and_batch_and_the_last_checkpoint_stays_good(
    cluster: Cluster, undisturbed: Outcome
) -> None:
    """The run to which nothing happened is gone on with, with a learning rate that is too much for it."""
    settings = ("run.resume=true", "run.allow=[optimizer]", "trainer.lr=1e15")
    run = cluster.launch("undisturbed", PLAIN, *settings, steps=STEPS + 10)
    output = fails(run)
    (line,) = [line for line in output.splitlines() if line.startswith("failure ")]
    said = rf"(loss|grad_norm) is (nan|inf) at step {STEPS + 2}, training stopped; the documents of its batch begin at \S+, line \d+"
    assert re.search(said, line), f"{line}; the step before had the weights that were good"
    assert f"checkpoint {STEPS} is from before it; lower trainer.lr" in line
    assert [cause for _, _, cause in failures(run)] == ["application"]
    assert list(run.losses(1)) == [STEPS + 1]
    check_last_good(run)
    assert max(run.checkpoints) == STEPS
    assert run.parameters() == undisturbed.parameters, "what it had exported stays"


@contextlib.contextmanager
def memory_group() -> Iterator[Path]:
    """A control group of the kernel's that counts memory (v1 or v2)."""
    legacy = Path("/sys/fs/cgroup/memory")
    group = (legacy if legacy.is_dir() else Path("/sys/fs/cgroup")) / f"podlaunch-test-{time.time_ns()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"needs the right to make a control group: {error}")
    if not usage(group).exists():
        group.rmdir()
        pytest.skip("the kernel counts no memory here")
    try:
        yield group
    finally:
        home = group.parent / "cgroup.procs"
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):  # it has ended
                home.write_text(pid)
        group.rmdir()


def usage(group: Path) -> Path:
    return next((path for path in (group / "memory.current", group / "memory.usage_in_bytes") if path.exists()), group / "memory.current")


@pytest.mark.long
def test_a_process_that_the_kernel_ends_for_its_memory_is_no_accident(cluster: Cluster, undisturbed: Outcome) -> None:
    run = cluster.start("devoured", PLAIN, until=3)
    with memory_group() as group:
        child = cluster.children(run, 0)[1]
        runner = child.parent()
        assert runner is not None
        (group / "cgroup.procs").write_text(str(runner.pid))
        child.kill()  # the next one is in the group from its first page on
        run.until(lambda: 10 in run.checkpoints, "a checkpoint")
        limits = {"memory.current": "memory.max", "memory.usage_in_bytes": "memory.limit_in_bytes"}
        (group / limits[usage(group).name]).write_text(str(int(usage(group).read_text()) + (1 << 20)))
        output = fails(run)
    assert failures(run) == [(0, "1", "infrastructure"), (1, "1", "oom")]
    assert ": out of memory" in output
    assert "out-of-memory killer" in output
    again = cluster.launch("devoured", PLAIN, "run.resume=true")
    again.end()
    check_end(again, undisturbed, infrastructure=1)


@contextlib.contextmanager
def storage_away(cluster: Cluster, seconds: float = AWAY_S) -> Iterator[None]:
    """Every request to Cloud Storage waits while the block lasts, and for so many seconds at least."""
    began = time.monotonic()
    cluster.admin("POST", "/storage", reachable=False)
    try:
        yield
        time.sleep(max(0.0, seconds - (time.monotonic() - began)))  # how long it is away is the fault
    finally:
        cluster.admin("POST", "/storage", reachable=True)


def on_gs(cluster: Cluster, name: str) -> Run:
    """A run whose directory is on gs://, with a checkpoint."""
    endpoint = cluster.storage
    Bucket("faults", endpoint, "any").ensure()
    launched = cluster.launch(name, PLAIN, "run.root=gs://faults/runs")
    run = Run(RunDirectory(f"gs://faults/runs/{name}", endpoint), launched.process)
    run.until(lambda: 10 in run.checkpoints, "a checkpoint")
    return run


def first_step_after(run: Run, when: float) -> float:
    """When it was done, seconds since the epoch."""
    run.until(lambda: any(row["time"] > when for row in run.directory.metrics()), "a step")
    return float(min(row["time"] for row in run.directory.metrics() if row["time"] > when))


def test_half_a_minute_without_object_storage_costs_a_run_on_gs_no_attempt(
    cluster: Cluster, undisturbed: Outcome, account: Account
) -> None:
    run = on_gs(cluster, "cut-off")
    children = cluster.children(run, 0)
    struck = time.time()
    with storage_away(cluster):
        pass
    back = time.time()
    assert all(process.is_running() for process in children.values()), "nobody was taken for dead"
    account.add(f"object storage away for {AWAY_S:.0f} s", seen=None, working=first_step_after(run, back) - struck)
    run.end()
    check_end(run, undisturbed)


@pytest.mark.long
def test_a_process_that_dies_while_object_storage_is_away_is_started_again_when_it_is_back(
    cluster: Cluster, undisturbed: Outcome, account: Account
) -> None:
    run = on_gs(cluster, "cut-off-and-killed")
    children = cluster.children(run, 0)
    with account.recovery(f"process killed, object storage away for {AWAY_S:.0f} s", run, attempt=1), storage_away(cluster):
        children[1].kill()
    run.end()
    check_end(run, undisturbed, infrastructure=1)


@pytest.mark.long
def test_a_supervisor_that_waits_for_object_storage_in_vain_leaves_its_run_to_the_next_one(
    cluster: Cluster, undisturbed: Outcome, account: Account
) -> None:
    """A new attempt has to be written down before it begins: after two minutes without an answer the supervisor gives up, and the run is
    unfinished until the storage is back.
    """
    run = on_gs(cluster, "cut-off-for-long")
    children, supervisors = cluster.children(run, 0), cluster.supervisors(run)
    struck = time.time()
    with storage_away(cluster, ANSWER_LIMIT_S + AWAY_S):
        children[1].kill()
        eventually(lambda: not any(process.is_running() for process in supervisors), "the end of the supervisor")
    working = first_step_after(run, struck) - struck
    account.add(f"process killed, object storage away for {ANSWER_LIMIT_S + AWAY_S:.0f} s", seen=None, working=working)
    assert "this goes on when it answers again" in run.end(), "who follows the run waits too"
    check_end(run, undisturbed, infrastructure=1)


@pytest.mark.long
def test_a_supervisor_and_a_process_killed_at_once_cost_one_attempt(cluster: Cluster, undisturbed: Outcome) -> None:
    run = cluster.start("headless-and-handless", PLAIN, until=13)
    children, supervisors = cluster.children(run, 0), cluster.supervisors(run)
    strike(dict(enumerate([*supervisors, children[1]])))
    run.end()
    check_end(run, undisturbed, infrastructure=1)


@dataclass(frozen=True)
class Strike:
    """Once the run's newest attempt has done `step`."""

    step: int
    fault: str
    worker: int


@dataclass(frozen=True)
class Kind:
    strike: Callable[[Cluster, Run, int, int], object]
    """Given the attempt that is under way, and the worker."""
    cause: str | None
    """What it is charged to; None: it costs no attempt."""


RAYLET, AGENT = "raylet/raylet ", "cluster.vm.host_agent"


def beside(cluster: Cluster, run: Run, attempt: int, worker: int, words: str) -> psutil.Process:
    return cluster.beside(cluster.children(run, attempt)[worker], words)


KINDS: Mapping[str, Kind] = {
    "process killed": Kind(lambda cluster, run, attempt, worker: cluster.children(run, attempt)[worker].kill(), "infrastructure"),
    "all processes killed": Kind(lambda cluster, run, attempt, _: strike(cluster.children(run, attempt)), "infrastructure"),
    "process stopped": Kind(lambda cluster, run, attempt, worker: cluster.children(run, attempt)[worker].suspend(), "infrastructure"),
    "raylet killed": Kind(lambda cluster, run, attempt, worker: beside(cluster, run, attempt, worker, RAYLET).kill(), "infrastructure"),
    "agent killed": Kind(lambda cluster, run, attempt, worker: beside(cluster, run, attempt, worker, AGENT).kill(), None),
    "supervisor killed": Kind(lambda cluster, run, *_: strike(dict(enumerate(cluster.supervisors(run)))), "infrastructure"),
    "preempted without notice": Kind(lambda cluster, run, *_: cluster.preempt(*run.slices, notice=0), "preempted"),
    "preempted with notice": Kind(lambda cluster, run, *_: cluster.preempt(*run.slices, notice=30), "preempted"),
}


def schedule(seed: int, strikes: int = 3) -> list[Strike]:
    """By the seed alone. Never the same step or the same fault twice; the last one strikes before the run is over."""
    chance = random.Random(seed)
    steps = sorted(chance.sample(range(2, STEPS - 8), strikes))
    faults = chance.sample(sorted(KINDS), strikes)
    return [Strike(step, fault, chance.randrange(2)) for step, fault in zip(steps, faults, strict=True)]


def test_a_schedule_is_its_seeds() -> None:
    assert schedule(7) == schedule(7)
    assert len({tuple(schedule(seed)) for seed in range(20)}) > 15
    assert {strike.fault for seed in range(100) for strike in schedule(seed)} == set(KINDS)


@pytest.mark.long
@pytest.mark.parametrize("number", range(2))
def test_a_random_schedule_of_faults_changes_nothing(
    cluster: Cluster, undisturbed: Outcome, account: Account, chaos_seed: int, number: int
) -> None:
    """`--chaos-seed` takes the seed that is printed."""
    seed = chaos_seed + number
    strikes = schedule(seed)
    print(f"\n--chaos-seed={seed} is {strikes}")
    run = cluster.launch(f"random-{number}", PLAIN, HANG)
    counts = Counter[str]()
    for one in strikes:
        cause = KINDS[one.fault].cause
        struck = strikes_at(run, cluster, one, counts.total())
        if cause is not None:
            counts[cause] += 1
            working = first_row(run, counts.total(), f"seed {seed}: after {one}")
            account.add(f"seed {seed}, step {one.step}: {one.fault}", seen=None, working=working - struck)
    run.end()
    check_end(run, undisturbed, **counts)


def strikes_at(run: Run, cluster: Cluster, one: Strike, attempt: int) -> float:
    """When, in seconds since the epoch."""
    run.until(lambda: any(step >= one.step for step in run.losses(attempt)), f"the moment of {one} in attempt {attempt}")
    struck = time.time()
    KINDS[one.fault].strike(cluster, run, attempt, one.worker)
    return struck


def first_row(run: Run, attempt: int, what: str) -> float:
    """When an attempt did its first step, seconds since the epoch."""
    run.until(lambda: bool(run.losses(attempt)), f"attempt {attempt}, {what},")
    return min(float(row["time"]) for row in run.directory.metrics() if row["attempt"] == attempt)


SCRIPT = ("job=script", f"run.code={ROOT / 'examples'}", f"job.entrypoint=train_nnx.py --steps={SCRIPT_STEPS} --log-every=1")
PARAMETERS = "parameters and optimizer state: sha256"


def launch_script(cluster: Cluster, name: str, *more: str) -> Run:
    return Run(cluster.home.run(name), cluster.home.start(*launch_command(f"run.name={name}", *SCRIPT, PLAIN, *cluster.settings, *more)))


def outcome_of_script(run: Run, attempt: int) -> Outcome:
    log = run.directory.read_log(attempt, 0).decode()
    (line,) = [line for line in log.splitlines() if line.startswith(PARAMETERS)]
    rows: list[dict[str, Any]] = list(run.directory.metrics())
    return Outcome({row["step"]: row["loss"] for row in rows}, line)


@pytest.mark.long
def test_a_users_script_outlives_a_kill_an_exception_and_a_preemption(cluster: Cluster, account: Account) -> None:
    undisturbed = launch_script(cluster, "script-undisturbed")
    undisturbed.end()
    expected = outcome_of_script(undisturbed, 0)
    assert sorted(expected.losses) == list(range(1, SCRIPT_STEPS + 1))

    run = launch_script(cluster, "script", "run.budget.application=1")
    run.reaches(30, attempt=0)
    with account.recovery("process of a script killed", run, attempt=1):
        cluster.children(run, 0)[1].kill()
    run.reaches(65, attempt=1)
    with account.recovery("exception in a script", run, attempt=2):
        raise_in(cluster.children(run, 1)[0])
    run.reaches(100, attempt=2)
    with account.recovery("script preempted, with 30 s notice", run, attempt=3):
        cluster.preempt(*run.slices, notice=30)
    run.end()
    status = run.directory.status()
    assert status is not None
    assert (status.state, status.attempt) == (RunState.SUCCEEDED, 3)
    assert [cause for _, _, cause in failures(run)] == ["infrastructure", "application", "preempted"]
    assert outcome_of_script(run, 3) == expected
    assert all(row["loss"] == expected.losses[row["step"]] for row in run.directory.metrics())
    eventually(lambda: len(cluster.slices()) == 1, "the slice that was taken is gone")
