"""Sweeps as a user runs them, on one cluster of two emulated slices: slices are busy, nothing is done twice, a failure stops nobody."""

import csv
import itertools
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.runs import AT_REST, RunState, RunStatus
from tests.integration.conftest import Home, eventually, launch_command, make_home

pytestmark = pytest.mark.timeout(400)
SLICES = 2
STEPS = 10
CLUSTER = ("cluster.accelerator_type=v4-8", f"cluster.max_slices={SLICES}", "run.spares=false")
POINT = """
import argparse, time
from launcher.training import script

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float)
parser.add_argument("--steps", type=int)
args = parser.parse_args()
for step in range(1, args.steps + 1):
    time.sleep(0.5)  # this is the work
    script.report(step, args.steps, loss=(args.lr - 3) ** 2)
    if args.lr == 0:
        raise ValueError("learning rate 0 learns nothing")
"""


@pytest.fixture(scope="module")
def user() -> Iterator[Home]:
    yield from make_home()


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("code")
    (folder / "point.py").write_text(POINT)
    return f"run.code={folder}"


def command(code: str, name: str, *points: tuple[float, int]) -> list[str]:
    """`points`: learning rate and steps of each."""
    entrypoints = ",".join(f"'point.py --lr={rate} --steps={steps}'" for rate, steps in points)
    return launch_command("-m", "job=script", *CLUSTER, code, f"run.name={name}", f"job.entrypoint={entrypoints}")


def runs(user: Home, name: str) -> list[RunStatus]:
    found = [user.run(path.name).status() for path in (user.folder / "runs").glob(f"{name}-*")]
    return sorted((status for status in found if status is not None), key=lambda status: status.started_at)


def results(said: str) -> list[dict[str, str]]:
    """What the file holds that a sweep names in the end."""
    *_, path = re.findall(r"^results +(.*)$", said, re.MULTILINE)
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def spans(statuses: list[RunStatus]) -> list[tuple[float, float]]:
    """When each run had a place of the sweep, from its submission to its end."""
    return [(status.started_at, status.ended_at) for status in statuses if status.ended_at is not None]


def most_at_once(intervals: list[tuple[float, float]]) -> int:
    changes = sorted([(begin, 1) for begin, _ in intervals] + [(end, -1) for _, end in intervals])
    return max(itertools.accumulate(change for _, change in changes))


@dataclass(frozen=True)
class Killed:
    """A sweep of six points whose command was killed half-way, and the same command again."""

    first: str
    under_way: dict[str, str | None]
    """Run -> job, of those that were left."""
    again: "subprocess.CompletedProcess[str]"


@pytest.fixture(scope="module")
def killed(user: Home, code: str) -> Killed:
    six = command(code, "grid", *((rate, STEPS) for rate in range(1, 7)))
    sweep = user.start(*six)

    def half() -> bool:
        states = [run.state for run in runs(user, "grid")]
        return len(states) == 4 and states.count(RunState.SUCCEEDED) == 2 and RunState.QUEUED not in states

    eventually(half, "the first two points have ended, and the next two have begun")
    sweep.send_signal(signal.SIGKILL)
    said, _ = sweep.communicate(timeout=60)
    under_way = {run.run_id: run.job for run in runs(user, "grid") if run.state not in AT_REST}
    return Killed(said, under_way, user.call(*six))


def test_a_sweep_keeps_two_slices_busy_and_goes_on_after_its_command_was_killed(user: Home, killed: Killed) -> None:
    again = killed.again
    assert again.returncode == 0, again.stdout + again.stderr
    assert "sweep       6 points, at most 2 at once" in killed.first
    assert 0 < len(killed.under_way) <= SLICES
    (found,) = re.findall(r"sweep       6 points \((.*)\), at most 2 at once", again.stdout)
    assert sum(map(int, re.findall(r"\d+", found))) == 4, "of these none is started again"
    statuses = runs(user, "grid")
    assert [status.state for status in statuses] == [RunState.SUCCEEDED] * 6
    assert {status.attempt for status in statuses} == {0}, "nothing was started twice"
    assert killed.under_way.items() <= {status.run_id: status.job for status in statuses}.items()
    assert [(row["state"], float(row["loss"])) for row in results(again.stdout)] == [("SUCCEEDED", (rate - 3) ** 2) for rate in range(1, 7)]
    assert "result      6 of 6 points SUCCEEDED" in again.stdout
    (best,) = [line for line in again.stdout.splitlines() if line.startswith("best ")]
    assert "--lr=3 " in best
    assert "loss 0.0000" in best

    intervals = spans(statuses)
    assert most_at_once(intervals) == SLICES
    both = sorted(since for since, _ in intervals)[SLICES - 1]  # from when on both slices were given out
    end = max(until for _, until in intervals)
    busy = sum(until - max(both, since) for since, until in intervals) / SLICES / (end - both)
    began = min(since for since, _ in intervals)
    print(f"\n6 points in {end - began:.1f} s; both slices were busy {busy:.1%} of all but the first {both - began:.1f} s")
    assert busy >= 0.9

    listed = json.loads(user.tpu("train", "status", "--json").stdout)
    assert sorted(row["run_id"] for row in listed) == sorted(status.run_id for status in statuses)
    assert all(row["run_id"].startswith("grid-entrypoint-point.py-lr-") for row in listed), "names that a person can read"
    shown = user.tpu("train", "status").stdout
    assert all(status.run_id in shown and status.run_id in again.stdout for status in statuses), "and that no table cuts"


def test_a_point_that_crashes_stops_no_other_one_and_the_command_says_why(user: Home, code: str, killed: Killed) -> None:
    done = [(1, STEPS), (2, STEPS), (3, STEPS)]  # there already, from another sweep of that name
    before = len(runs(user, "grid"))
    result = user.call(*command(code, "grid", (0, 1), (7, 6), (8, 1), *done))
    assert result.returncode == 100, result.stdout + result.stderr
    assert "sweep       6 points (3 done), at most 2 at once" in result.stdout
    assert "result      5 of 6 points SUCCEEDED" in result.stdout
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: point 1 of the sweep (job.entrypoint=")
    assert last.endswith("ValueError: learning rate 0 learns nothing")
    failed, *others = runs(user, "grid")[before:]
    assert (failed.state, [one.state for one in others]) == (RunState.FAILED, [RunState.SUCCEEDED] * 2)
    assert failed.ended_at is not None
    assert others[-1].started_at > failed.ended_at, "the last one was started when the first had failed"


def test_optuna_searches_two_points_at_a_time_and_the_same_seed_finds_them_again(user: Home, code: str) -> None:
    settings = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2", "hydra.sweeper.sampler.seed=1")
    search = [*command(code, "search", *((rate, 1) for rate in range(1, 9))), *settings]
    result = user.call(*search)
    assert result.returncode == 0, result.stdout + result.stderr
    statuses = runs(user, "search")
    assert {row["run"] for row in results(result.stdout)} == {status.run_id for status in statuses}
    assert 2 <= len(statuses) <= 4, "one that it asks for twice is one run"
    assert most_at_once(spans(statuses)) == SLICES
    again = user.call(*search)
    assert again.returncode == 0, again.stdout + again.stderr
    assert runs(user, "search") == statuses
