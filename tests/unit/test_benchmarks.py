"""What the benchmarks make of what they measured. They themselves run by hand."""

import json
from pathlib import Path

import pytest

from benchmarks import overhead, recovery, soak, throughput
from benchmarks.measure import GANG, Failed, Lines, Told, first_new_step, last_line, median, ratio, table, wait_for
from benchmarks.recovery import Sample
from benchmarks.throughput import Visit
from launcher.training.spare import libraries_of


def step(number: int, pid: int) -> dict[str, float]:
    return {"step": number, "pid": pid, "time": 100.0 + number + pid}


def test_a_new_step_is_one_of_a_new_process_beyond_all_that_the_old_ones_did() -> None:
    told = [step(1, 7), step(2, 7), step(3, 7)]
    assert first_new_step(told, frozenset({7})) is None
    told += [step(3, 8)]
    assert first_new_step(told, frozenset({7})) is None, "done before"
    told += [step(4, 7)]  # the old process had not died yet
    told += [step(4, 8), step(5, 8), step(6, 8)]
    assert first_new_step(told, frozenset({7})) == step(5, 8)["time"]


def test_a_file_that_grows_is_read_once_and_to_its_last_whole_line(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "steps.jsonl")
    assert lines.all() == []
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n{"st')
    assert lines.all() == [{"step": 1}]
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert lines.all() == [{"step": 1}, {"step": 2}]


def test_the_process_that_is_killed_is_of_the_newest_attempt(tmp_path: Path) -> None:
    rows = [(0, 10), (1, 11), (1, 21), (0, 20)]
    (tmp_path / "processes.jsonl").write_text("".join(json.dumps({"process": index, "pid": pid}) + "\n" for index, pid in rows))
    told = Told(tmp_path)
    assert (told.pid(0), told.pid(1)) == (20, 21)
    assert told.pids() == {10, 11, 20, 21}


def test_medians_and_ratios_are_of_what_there_is() -> None:
    assert median([3.0, None, 1.0, 2.0]) == 2.0
    assert median([None]) is None
    assert ratio(1.0, 3.0) == 0.3333
    assert ratio(None, 3.0) is None
    assert ratio(1.0, None) is None


def test_the_ratios_are_by_the_better_peer_and_the_targets_decide(capsys: pytest.CaptureFixture[str]) -> None:
    samples = {
        "podlaunch": [Sample(launch=8.0, recovery=1.0), Sample(launch=10.0, recovery=2.0), Sample(launch=9.0, recovery=1.5)],
        "default": [Sample(launch=30.0, recovery=20.0, command=36.0)],
        "tuned": [Sample(launch=40.0, recovery=15.0), Sample(error="never came")],
        "not run": [],
    }
    result = recovery.report(samples, "podlaunch", ["default", "tuned", "not run"])
    assert (result["launch_ratio"], result["recovery_ratio"], result["submission_ratio"]) == (0.3, 0.1, 0.25)
    assert recovery.met(result)
    assert not recovery.met({**result, "recovery_ratio": 0.1001})
    assert not recovery.met({**result, "launch_ratio": None})
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split() == ["podlaunch", "9.00", "-", "1.50", "3"]
    line = last_line(result)
    assert "\n" not in line
    assert json.loads(line)["raw"]["tuned"][1]["error"] == "never came"


def test_a_table_has_its_columns_below_each_other() -> None:
    assert table(["", "s"], [["long name", 1.0], ["b", None]]).splitlines() == ["              s", "long name  1.00", "b             -"]


def test_a_wait_ends_with_one_line() -> None:
    with pytest.raises(Failed, match="not within 0 s: the end of the world"):
        wait_for(lambda: False, "the end of the world", 0.0)


def row(fault: int, **changed: float) -> dict[str, float]:
    return dict.fromkeys(soak.COLUMNS, 100.0) | {"groups": 2.0} | changed


def test_what_stays_the_same_is_flat_and_what_piles_up_is_named() -> None:
    warming = [row(fault, **{"sup MB": min(120.0, 80.0 + 10 * fault)}) for fault in range(50)]
    assert soak.verdict(warming, {"processes": 0})["flat"]
    leaking = [row(fault, **{"run fds": 30.0 + fault, "sup MB": 100.0 + fault * 0.1}) for fault in range(50)]
    found = soak.verdict(leaking, {"processes": 0, "placement groups": 1})
    assert (found["flat"], found["leaks"]) == (False, ["run fds", "left: placement groups"])
    assert found["growth"]["run fds"] == 30.0


@pytest.mark.parametrize(
    ("name", "kept"),
    [("logs/3/host-0.log", True), ("status.json", True), ("claims/200.json", True), (".status.json.x1", False), ("claims.tmp", False)],
)
def test_what_a_run_directory_may_hold_more_of(name: str, kept: bool) -> None:
    assert soak._is_kept(name) is kept


def test_overhead_counts_steps_after_the_warm_ones_and_what_checkpoints_block() -> None:
    rows = [{"step": number, "loss": 1.0, "time": 10.0 + (5.0 if number >= 20 else 0.0) + number * 0.5} for number in (1, 10, 20, 30, 40)]
    assert overhead.steps_per_second(rows, warm=20) == 2.0
    saves = [{"event": "checkpoint", "step": number, "blocking_s": 0.1} for number in (20, 40)]
    evaluation = {"event": "evaluation", "step": 40, "loss": 2.0, "time": 99.0}
    assert overhead.blocking_share([*rows, *saves, evaluation], steps=40) == pytest.approx(0.1 / (0.5 * 39 + 5.0))


def test_throughput_is_of_the_steps_after_the_warm_ones_and_the_losses_tell_whether_the_work_was_the_same() -> None:
    losses = [5.0, 4.5, 4.0, 3.0]
    visits = {
        "podlaunch": [Visit(50.0, 4.0, 6.0, losses), Visit(9.0, 2.0, 2.0, losses), Visit(7.0, 2.0, 4.0, losses)],
        "peer": [Visit(90.0, 1.0, 1.0, [5.0, 4.5, 4.0, 3.03])],
    }
    result = throughput.report(visits, tokens=512)
    assert result["medians"]["podlaunch"] == {
        "tokens_per_second": 512.0,
        "cpu_seconds_per_step": 2.0,
        "first_step_cold_s": 50.0,
        "first_step_s": 8.0,
    }
    assert (result["tokens_ratio"], result["cpu_ratio"]) == ({"peer": 0.5}, {"peer": 4.0})
    assert result["medians"]["peer"]["first_step_s"] is None
    assert result["loss_difference"] == pytest.approx(0.01)


def test_a_spare_imports_ahead_what_the_benchmarks_train_with() -> None:
    assert libraries_of(GANG) == ["jax", "orbax.checkpoint", "numpy"], "no file there names environment variables"
