"""Sweeps as a user runs them, on one cluster of two emulated slices: slices are busy, nothing is done twice, a failure stops nobody."""

import csv
import itertools
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.goodput import Phase
from launcher.runs import AT_REST, RunState, RunStatus
from tests.integration.conftest import Home, eventually, launch_command, make_home

pytestmark = pytest.mark.timeout(400)
SLICES = 2
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


@pytest.fixture
def code(tmp_path: Path) -> str:
    (tmp_path / "point.py").write_text(POINT)
    return f"run.code={tmp_path}"


def command(code: str, name: str, steps: int, *rates: float) -> list[str]:
    entrypoints = ",".join(f"'point.py --lr={rate} --steps={steps}'" for rate in rates)
    return launch_command("-m", "job=script", *CLUSTER, code, f"run.name={name}", f"job.entrypoint={entrypoints}")


def runs(user: Home, name: str) -> list[RunStatus]:
    found = [user.run(path.name).status() for path in (user.folder / "runs").glob(f"{name}-*")]
    return sorted((status for status in found if status is not None), key=lambda status: status.started_at)


def results(user: Home, name: str) -> list[dict[str, str]]:
    (folder,) = (user.folder / "multirun").glob(f"{name}-*")
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def spans(statuses: list[RunStatus]) -> list[tuple[float, float]]:
    """When each run had a place of the sweep, from its submission to its end."""
    return [(status.started_at, status.ended_at) for status in statuses if status.ended_at is not None]


def most_at_once(intervals: list[tuple[float, float]]) -> int:
    changes = sorted([(begin, 1) for begin, _ in intervals] + [(end, -1) for _, end in intervals])
    return max(itertools.accumulate(change for _, change in changes))


def test_a_sweep_keeps_two_slices_busy_and_goes_on_after_its_command_was_killed(user: Home, code: str) -> None:
    six = command(code, "grid", 10, 1, 2, 3, 4, 5, 6)
    sweep = user.start(*six)
    eventually(lambda: len(runs(user, "grid")) == 4, "the third and the fourth point have begun")
    sweep.send_signal(signal.SIGKILL)
    said, _ = sweep.communicate(timeout=60)
    assert "sweep       6 points, at most 2 at once" in said
    under_way = {run.run_id: run.job for run in runs(user, "grid") if run.state not in AT_REST}
    assert 0 < len(under_way) <= SLICES

    again = user.call(*six)
    assert again.returncode == 0, again.stdout + again.stderr
    (found,) = re.findall(r"sweep       6 points \((.*)\), at most 2 at once", again.stdout)
    assert sum(map(int, re.findall(r"\d+", found))) == 4, "of these none is started again"
    statuses = runs(user, "grid")
    assert [status.state for status in statuses] == [RunState.SUCCEEDED] * 6
    assert {status.attempt for status in statuses} == {0}, "nothing was started twice"
    assert under_way.items() <= {status.run_id: status.job for status in statuses}.items()
    assert [(row["state"], float(row["loss"])) for row in results(user, "grid")] == [("SUCCEEDED", (rate - 3) ** 2) for rate in range(1, 7)]
    assert "result      6 of 6 points SUCCEEDED" in again.stdout
    (best,) = [line for line in again.stdout.splitlines() if line.startswith("best ")]
    assert "--lr=3 " in best
    assert "loss 0.0000" in best

    intervals = spans(statuses)
    assert most_at_once(intervals) == SLICES
    whole = max(end for _, end in intervals) - min(begin for begin, _ in intervals)
    busy = sum(end - begin for begin, end in intervals) / SLICES / whole
    scripts = sum(status.phases.get(Phase.TRAINING, 0.0) for status in statuses)
    print(f"\n6 points in {whole:.1f} s; the two slices were busy {busy:.1%} of that, {scripts:.1f} s of it with the script's own steps")
    assert busy >= 0.9

    listed = json.loads(user.tpu("train", "status", "--json").stdout)
    assert sorted(row["run_id"] for row in listed) == sorted(status.run_id for status in statuses)
    assert all(row["run_id"].startswith("grid-entrypoint-point.py-lr-") for row in listed), "names that a person can read"


def test_a_point_that_crashes_stops_no_other_one_and_the_command_says_why(user: Home, code: str) -> None:
    result = user.call(*command(code, "crash", 1, 0, 1, 2, 3, 4, 5))
    assert result.returncode == 100, result.stdout + result.stderr
    assert [row["state"] for row in results(user, "crash")] == ["FAILED", *["SUCCEEDED"] * 5]
    assert "result      5 of 6 points SUCCEEDED" in result.stdout
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: point 1 of the sweep (job.entrypoint=")
    assert last.endswith("ValueError: learning rate 0 learns nothing")
    assert most_at_once(spans(runs(user, "crash"))) == SLICES


def test_optuna_searches_two_points_at_a_time_and_the_same_seed_finds_them_again(user: Home, code: str) -> None:
    settings = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2", "hydra.sweeper.sampler.seed=1")
    search = [*command(code, "search", 1, *range(1, 9)), *settings]
    result = user.call(*search)
    assert result.returncode == 0, result.stdout + result.stderr
    statuses = runs(user, "search")
    assert {row["run"] for row in results(user, "search")} == {status.run_id for status in statuses}
    assert 2 <= len(statuses) <= 4, "one that it asks for twice is one run"
    assert most_at_once(spans(statuses)) == SLICES
    again = user.call(*search)
    assert again.returncode == 0, again.stdout + again.stderr
    assert runs(user, "search") == statuses
