"""What a run shows to Prometheus, with Ray's gauges replaced at their seam."""

from collections.abc import Mapping
from typing import Any

import pytest

from cluster.tpu.lifecycle import Life
from launcher.gang.gauges import MEASUREMENTS, TAGS, Gauges, RunGauges
from launcher.runs import Recoveries, RunState, RunStatus

Shown = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Board:
    """Keeps what gauges were set to: (name without its prefix, tags beside run and cluster) -> value."""

    def __init__(self) -> None:
        self.shown: Shown = {}
        self.sets = 0

    def gauge(self, name: str, *, description: str, tag_keys: tuple[str, ...]) -> "Board.Gauge":
        assert description
        return Board.Gauge(self, name.removeprefix("podlaunch_"), tag_keys)

    class Gauge:
        def __init__(self, board: "Board", name: str, tag_keys: tuple[str, ...]) -> None:
            self._board, self._name, self._keys = board, name, tag_keys

        def set(self, value: float, tags: Mapping[str, str]) -> None:
            assert set(tags) == set(self._keys), "Ray refuses others"
            assert (tags["run"], tags["cluster"]) == ("r", "c")
            self._board.sets += 1
            self._board.shown[self._name, tuple((key, tags[key]) for key in self._keys if key not in TAGS)] = value


@pytest.fixture
def board() -> Board:
    return Board()


def status(**fields: Any) -> RunStatus:
    return RunStatus("r", "c", **{"state": RunState.RUNNING, **fields})


def test_a_status_is_shown_with_what_is_known_and_nothing_else(board: Board) -> None:
    gauges = RunGauges(Gauges("r", "c", board.gauge), 12.5, lambda: [Life.READY, Life.PENDING, Life.READY])
    gauges.show(status(step=3, total_steps=9, loss=1.5, slices=["s"], recoveries=Recoveries(preempted=2), phases={"training": 4.0}))
    shown = board.shown
    assert (shown["loss", ()], shown["step", ()], shown["total_steps", ()], shown["usd_per_hour", ()]) == (1.5, 3, 9, 12.5)
    assert shown["recoveries", (("cause", "preempted"),)] == 2
    assert shown["phase_seconds", (("phase", "training"),)] == 4.0
    assert [state for state in RunState if shown["run_state", (("state", state.value),)]] == [RunState.RUNNING]
    slices = {tags[0][1]: value for (name, tags), value in shown.items() if name == "slices"}
    assert slices == {"pending": 1, "ready": 2, "interrupted": 0, "lost": 0, "deleting": 0}
    assert not {"mfu", "goodput", "held_out_loss", "checkpoint_step"} & {name for name, _ in shown}


def test_a_run_that_holds_no_slices_costs_nothing_now_and_one_without_a_price_says_nothing(board: Board) -> None:
    RunGauges(Gauges("r", "c", board.gauge), 12.5, list).show(status())
    assert board.shown["usd_per_hour", ()] == 0
    board.shown.clear()
    RunGauges(Gauges("r", "c", board.gauge), None, list).show(status())
    assert ("usd_per_hour", ()) not in board.shown


def test_it_is_shown_once_a_second_but_the_end_at_once(board: Board) -> None:
    now = [0.0]
    gauges = RunGauges(Gauges("r", "c", board.gauge), None, list, lambda: now[0])
    gauges.show(status())
    first = board.sets
    now[0] = 0.5
    gauges.show(status())
    assert board.sets == first
    gauges.show(status(state=RunState.SUCCEEDED), now=True)
    assert board.shown["run_state", (("state", "SUCCEEDED"),)] == 1
    assert board.shown["run_state", (("state", "RUNNING"),)] == 0


def test_steps_and_checkpoints_are_heard_from_process_0(board: Board) -> None:
    gauges = RunGauges(Gauges("r", "c", board.gauge), None, list)
    gauges.hear(1, {"event": "step", "step_time": 9.0})
    gauges.hear(0, {"event": "step", "step_time": None})
    assert board.shown == {}
    gauges.hear(0, {"event": "step", "step_time": 0.5})
    gauges.hear(0, {"event": "checkpoint", "step": 1, "blocking_s": 0.1, "write_s": 2.0})
    gauges.hear(0, {"event": "phase", "phase": "saving"})
    assert board.shown == {("step_seconds", ()): 0.5, ("checkpoint_blocking_seconds", ()): 0.1, ("checkpoint_write_seconds", ()): 2.0}


def test_measurements_have_names_of_their_own() -> None:
    assert len({one.name for one in MEASUREMENTS}) == len(MEASUREMENTS)
