"""How a sweep works through its points, over real run directories; whoever starts and executes the runs is made up."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.errors import ClusterError
from launcher.config import LaunchConfig
from launcher.runs import FirstFailure, RunDirectory, RunState, RunStatus
from launcher.sweep import TRIES, Detached, NotNow, Sweep
from launcher.sweep_places import FOLLOWED, FOUND, Place, Standing
from launcher.sweep_points import Point
from launcher.sweep_view import RESULTS, best_of, in_sight, table
from launcher.watch import HeadGone

TICK_S = 10.0


def point(number: int, **run: Any) -> Point:
    values: dict[str, Any] = {
        "cluster": {"name": "c", "cloud": "emulated", "accelerator_type": "v4-16"},
        "job": {"kind": "script", "entrypoint": f"train.py --lr={number}"},
        "run": {"name": f"sweep-lr-{number}", **run},
    }
    return Point(number, (f"trainer.lr={number}",), LaunchConfig.from_dict(values))


POINTS = [point(number) for number in range(1, 7)]


class World:
    """Runs of made-up clusters: each lasts so many ticks and ends as it is told to."""

    def __init__(self, root: Path, slices: int = 2) -> None:
        self.root, self.slices, self.now = root, slices, 1000.0
        self.lasts: dict[str, int] = {}
        self.ends: dict[str, RunState] = {}
        self.refused: dict[str, list[Exception]] = {}
        self.elsewhere: set[str] = set()
        """What another command starts at the same moment."""
        self.started: list[str] = []
        self.most_at_once = 0
        self.brought_up = 0
        self.checked: list[str] = []
        self.troubles: list[str | Exception] = []
        self.interrupt_at: float | None = None

    def find(self, point: Point) -> RunDirectory:
        return RunDirectory(self.root / point.run_id)

    def check(self, places: Sequence[Place]) -> None:
        self.checked += [place.point.run_id for place in places]

    def bring_up(self, places: Sequence[Place]) -> None:
        self.brought_up += 1

    def most(self, point: Point) -> int:
        return self.slices

    def start(self, place: Place) -> None:
        name = place.point.run_id
        if waiting := self.refused.get(name):
            raise waiting.pop(0)
        self.write(name, RunState.QUEUED, started_at=self.now)
        if name in self.elsewhere:
            raise ClusterError("is being started by another command")
        self.started.append(name)

    def trouble(self, under_way: Sequence[Place]) -> str | None:
        said = self.troubles.pop(0) if self.troubles else None
        if isinstance(said, Exception):
            raise said
        return said

    def write(self, name: str, state: RunState, **more: Any) -> None:
        run = RunDirectory(self.root / name)
        run.path.mkdir(parents=True, exist_ok=True)
        run.replace_status(dataclasses.replace(RunStatus(name, "c", state), updated_at=self.now, **more))

    def sleep(self, _: float) -> None:
        """Time passes, and with it the runs."""
        self.now += TICK_S
        if self.interrupt_at is not None and self.now >= self.interrupt_at:
            self.interrupt_at = None
            raise KeyboardInterrupt
        living = 0
        for name in sorted(path.name for path in self.root.iterdir()):
            status = RunDirectory(self.root / name).status()
            assert status is not None
            if FOLLOWED[status.state] is Standing.UNDER_WAY:
                living += 1
                self._advance(name, status)
        self.most_at_once = max(self.most_at_once, living)

    def _advance(self, name: str, status: RunStatus) -> None:
        if self.now - status.started_at < TICK_S * self.lasts.get(name, 2):
            self.write(name, RunState.RUNNING, started_at=status.started_at, step=1)
            return
        state = self.ends.get(name, RunState.SUCCEEDED)
        more: dict[str, Any] = {"started_at": status.started_at, "ended_at": self.now, "step": 5, "total_steps": 5}
        if state is RunState.FAILED:
            more |= {"reason": "application error", "first_failure": FirstFailure("s/0", "ValueError: boom")}
        self.write(name, state, loss=float(name[-1]), **more)


@pytest.fixture
def world(tmp_path: Path) -> World:
    (tmp_path / "runs").mkdir()
    return World(tmp_path / "runs")


def sweep(world: World, points: Sequence[Point] = POINTS, limit: int | None = None, **console: Any) -> tuple[list[Place], str]:
    output = io.StringIO()
    made = make_sweep(world, output, limit, **console)
    return made.work_through(points), output.getvalue()


def make_sweep(world: World, output: io.StringIO, limit: int | None = None, **console: Any) -> Sweep:
    shown = Console(file=output, width=200, **console)
    return Sweep(shown, world, world.root.parent / "sweep", limit, "the same command", clock=lambda: world.now, sleep=world.sleep)


def results(world: World) -> list[dict[str, str]]:
    with (world.root.parent / "sweep" / RESULTS).open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_point_runs_once_and_as_many_at_once_as_there_are_slices(world: World) -> None:
    places, text = sweep(world)
    assert world.started == [point.run_id for point in POINTS]
    assert world.most_at_once == 2
    assert world.now == 1000 + 3 * 2 * TICK_S, "a place that is free is taken at once"
    assert [place.score for place in places] == [1, 2, 3, 4, 5, 6]
    lines = text.splitlines()
    assert "sweep       6 points, at most 2 at once" in lines
    assert "result      6 of 6 points SUCCEEDED" in lines
    assert "best        sweep-lr-1 (trainer.lr=1): loss 1.0000" in lines
    assert f"results     {world.root.parent / 'sweep' / RESULTS}" in lines


def test_the_results_are_a_table_with_the_settings_in_columns(world: World) -> None:
    sweep(world)
    rows = results(world)
    assert [(row["run"], row["trainer.lr"], row["state"], row["loss"]) for row in rows] == [
        (f"sweep-lr-{n}", str(n), "SUCCEEDED", f"{n}.0") for n in range(1, 7)
    ]
    assert rows[0]["directory"] == str(world.root / "sweep-lr-1")


@pytest.mark.parametrize("limit", [1, 3, 9])
def test_max_concurrent_bounds_what_goes_on_at_once(world: World, limit: int) -> None:
    sweep(world, limit=limit)
    assert world.most_at_once == min(limit, 6)


def test_a_point_that_fails_stops_no_other_one_and_is_told_with_its_first_error(world: World) -> None:
    world.ends["sweep-lr-2"] = RunState.FAILED
    places, text = sweep(world)
    assert [place.succeeded for place in places] == [True, False, True, True, True, True]
    assert places[1].failure == "FAILED, host s/0: ValueError: boom"
    assert "failed      sweep-lr-2 (trainer.lr=2): FAILED, host s/0: ValueError: boom" in text.splitlines()
    assert "result      5 of 6 points SUCCEEDED" in text.splitlines()
    assert any(line.endswith("sweep-lr-2  FAILED: host s/0: ValueError: boom") for line in text.splitlines())
    assert results(world)[1]["failure"] == "FAILED, host s/0: ValueError: boom"


def test_a_point_that_cannot_be_started_stops_no_other_one(world: World) -> None:
    world.refused["sweep-lr-1"] = [ClusterError("the head refused it")] * TRIES
    places, text = sweep(world)
    assert [place.succeeded for place in places] == [False, True, True, True, True, True]
    assert "failed      sweep-lr-1 (trainer.lr=1): the head refused it" in text.splitlines()


def test_a_point_that_is_refused_once_is_tried_again_and_nothing_else_is_tried_meanwhile(world: World) -> None:
    world.refused["sweep-lr-1"] = [ClusterError("no agent")]
    places, text = sweep(world)
    assert all(place.succeeded for place in places)
    assert world.started == [point.run_id for point in POINTS]
    assert "sweep-lr-1 could not be started and is tried again: no agent" in text.splitlines()


def test_nothing_is_started_while_the_head_is_away(world: World) -> None:
    world.refused["sweep-lr-3"] = [NotNow("the head does not answer"), NotNow("the head does not answer")]
    places, text = sweep(world)
    assert all(place.succeeded for place in places)
    assert world.started == [point.run_id for point in POINTS]
    assert text.count("the head does not answer") == 1, "said once"


@pytest.mark.parametrize("when", ["starting", "following"])
def test_a_head_that_is_gone_ends_the_sweep_which_says_how_to_go_on(world: World, when: str) -> None:
    if when == "starting":
        world.refused["sweep-lr-1"] = [HeadGone("the head is gone")]
    else:
        world.troubles = ["it is slow", HeadGone("the head is gone")]
    with pytest.raises(HeadGone, match="go on with the sweep by the same command: the same command"):
        sweep(world)
    assert len(results(world)) == 6


def interrupted(world: World, when: float) -> str:
    """The sweep of a command that somebody interrupts; what it says."""
    world.interrupt_at = when
    output = io.StringIO()
    with pytest.raises(Detached):
        make_sweep(world, output).work_through(POINTS)
    return output.getvalue()


def test_ctrl_c_leaves_what_is_under_way_alone_and_says_how_to_go_on_and_to_stop(world: World) -> None:
    text = interrupted(world, 1000 + 3 * TICK_S)
    for line in (
        "detached    2 points go on, 2 wait until the sweep goes on",
        "go on       the same command",
        f"stop one    tpu train stop {world.root / 'sweep-lr-3'}",
        f"stop one    tpu train stop {world.root / 'sweep-lr-4'}",
    ):
        assert line in text.splitlines()
    assert [row["state"] for row in results(world)] == ["SUCCEEDED", "SUCCEEDED", "QUEUED", "QUEUED", "WAITING", "WAITING"]


def test_the_same_sweep_again_goes_on_where_it_was(world: World) -> None:
    interrupted(world, 1000 + 3 * TICK_S)
    world.lasts["sweep-lr-3"] = 9
    places, text = sweep(world)
    assert "sweep       6 points (2 done, 2 under way), at most 2 at once" in text.splitlines()
    assert world.started == [point.run_id for point in POINTS], "each once"
    assert world.most_at_once == 2
    assert all(place.succeeded for place in places)
    assert world.checked[6:] == ["sweep-lr-5", "sweep-lr-6"], "what runs is not checked as if it were to be started"
    again, text = sweep(world)
    assert text.count("SUCCEEDED") == 6 + 1, "no news, but the table and the result"
    assert [place.status for place in again] == [place.status for place in places]
    assert world.brought_up == 2, "nothing is needed for a sweep that is done"


@pytest.mark.parametrize("state", [RunState.FAILED, RunState.STOPPED, RunState.SUSPENDED])
def test_what_ended_without_success_is_taken_up_by_the_next_command_only(world: World, state: RunState) -> None:
    world.ends["sweep-lr-2"] = state
    sweep(world)
    assert world.started.count("sweep-lr-2") == 1
    world.ends.clear()
    places, _ = sweep(world)
    assert world.started[6:] == ["sweep-lr-2"]
    assert all(place.succeeded for place in places)


def test_a_point_that_has_used_up_its_own_limit_is_not_taken_up_again(world: World) -> None:
    limited = point(1, max_hours=1.0)
    world.write(limited.run_id, RunState.STOPPED, phases={"training": 3600.0}, reason="stopped: run.max_hours=1 is reached")
    (place,), _ = sweep(world, [limited])
    assert world.started == []
    assert place.failure == "STOPPED: stopped: run.max_hours=1 is reached"


def test_two_equal_points_are_one_run(world: World) -> None:
    places, _ = sweep(world, [POINTS[0], POINTS[1], POINTS[0]])
    assert world.started == ["sweep-lr-1", "sweep-lr-2"]
    assert [place.point.run_id for place in places] == ["sweep-lr-1", "sweep-lr-2", "sweep-lr-1"]


def test_a_sweeper_that_goes_batch_by_batch_gets_one_table_of_results_and_the_best_of_all(world: World) -> None:
    output = io.StringIO()
    made = make_sweep(world, output)
    made.work_through(POINTS[:2])
    made.work_through(POINTS[2:4])
    assert [row["run"] for row in results(world)] == [point.run_id for point in POINTS[:4]]
    assert output.getvalue().splitlines().count("best        sweep-lr-1 (trainer.lr=1): loss 1.0000") == 2


def test_a_search_that_asks_again_for_a_point_that_failed_is_told_so_at_once(world: World) -> None:
    world.ends["sweep-lr-2"] = RunState.FAILED
    made = make_sweep(world, io.StringIO())
    first = made.work_through(POINTS[:2])
    assert made.work_through(POINTS[1:2]) == first[1:]
    assert world.started == ["sweep-lr-1", "sweep-lr-2"]


def test_a_point_that_another_command_starts_meanwhile_is_followed(world: World) -> None:
    world.elsewhere.add("sweep-lr-1")
    places, _ = sweep(world)
    assert all(place.succeeded for place in places)
    assert "sweep-lr-1" not in world.started


def test_every_state_of_a_run_has_a_standing() -> None:
    assert set(FOUND) == set(FOLLOWED) == set(RunState)


def test_a_terminal_shows_one_live_table(world: World) -> None:
    _, text = sweep(world, force_terminal=True, height=40)
    assert text.count("overrides") > 3, "it is drawn again and again"
    assert "sweep-lr-3  RUNNING\n" not in text, "no line for each change"


def places_of(world: World, states: Sequence[RunState | None]) -> list[Place]:
    made = []
    for one, state in zip(POINTS, states, strict=False):
        if state is not None:
            world.write(one.run_id, state, started_at=900.0, loss=2.5, step=3, total_steps=9)
        made.append(Place(one, world.find(one)))
        made[-1].follow()
    return made


def test_the_table_tells_of_each_point(world: World) -> None:
    output = io.StringIO()
    Console(file=output, width=150).print(table(places_of(world, [RunState.RUNNING, None]), now=965.0))
    header, first, second = (line.split() for line in output.getvalue().splitlines())
    assert header == ["ID", "overrides", "STATUS", "STEP", "LOSS", "RECOVERIES", "DURATION"]
    assert first == ["sweep-lr-1", "trainer.lr=1", "RUNNING", "3/9", "2.5000", "0", "01:05"]
    assert second == ["sweep-lr-2", "trainer.lr=2", "WAITING"]


def test_a_small_terminal_shows_what_goes_on_first_and_then_what_failed(world: World) -> None:
    places = places_of(world, [RunState.SUCCEEDED, None, RunState.FAILED, RunState.RUNNING])
    assert [place.point.number for place in in_sight(places, 2)] == [4, 3]
    assert in_sight(places, 4) == places


def test_the_best_point_is_the_one_with_the_lowest_held_out_loss(world: World) -> None:
    places = places_of(world, [RunState.SUCCEEDED] * 4 + [RunState.FAILED])
    assert [place.status is not None for place in places] == [True] * 5
    for place, held_out in zip(places, [3.0, float("nan"), 2.0, None, 1.0], strict=True):
        assert place.status is not None
        place.status = dataclasses.replace(place.status, held_out_after=held_out, loss=9.0)
    best = best_of(places)
    assert best is not None
    assert (best.point.number, best.score) == (3, 2.0)
    assert best_of([]) is None
