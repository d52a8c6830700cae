"""What benchmarks/tpu_compile.py makes of what the compiler said. It runs by hand: a point takes minutes."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tpu_compile
from benchmarks.measure import last_line
from benchmarks.tpu_compile import Point, fill, met, show, verdict
from launcher.estimate.run import estimate_of

POINT = Point("270m", True, "v6e-8", slices=2)


def row(total: float, estimate: float, *, good: bool = True, fused: bool = True, compiles: bool | None = True) -> dict[str, Any]:
    return {
        "point": POINT.name,
        "mesh": {"slice": 2, "data": 1, "fsdp": 8, "sequence": 1, "tensor": 1},
        "good": good,
        "compiler": {
            "compiles": compiles,
            "fits": good,
            "total_bytes": total,
            "arguments_bytes": total / 2,
            "temporaries_bytes": total / 2,
            "collectives": {"all-reduce": 2, "all-gather": 3},
            "fused_attention": fused,
            "seconds": 20.4,
            "cpu_seconds": 15.6,
        },
        "estimated": {
            "bytes": {"total": estimate, "program": 0.1 * estimate},
            "step_seconds_at_least": 0.02,
            "bound_by": "HBM",
            "tokens_per_second_at_most": 1e6,
            "mfu_at_most": 0.31,
        },
    }


def test_a_point_is_the_launch_that_a_user_would_give() -> None:
    assert POINT.name == "270m-lora-v6e-8-x2"
    assert [tpu_compile.named(point.name) for point in (POINT, Point("1b", False, "v5p-8"))] == [POINT, Point("1b", False, "v5p-8")]
    config = POINT.config
    assert (config.slices.accelerator.name, config.slices.slices, config.training.model.lora.rank) == ("v6e-8", 2, tpu_compile.LORA_RANK)
    assert (config.trainer.batch_size, config.trainer.seq_len, config.trainer.compute_dtype) == (32, 2048, "bfloat16")


def test_the_smallest_slice_is_one_that_the_step_fits_however_far_the_estimate_is_off() -> None:
    assert tpu_compile.smallest_slice("270m", False, "v6e") == "v6e-4"
    larger = Point("12b", False, tpu_compile.smallest_slice("12b", False, "v6e")).config
    assert larger.slices.accelerator.chips > 8


def test_points_are_chosen_by_how_their_names_begin() -> None:
    assert [point.name for point in tpu_compile.points(("270m-full-v6e", "4b-lora-v6e-16"))] == [
        "270m-full-v6e-16",
        "4b-lora-v6e-16",
        "270m-full-v6e-8-x2",
        "270m-full-v6e-4",
    ]


def test_what_is_known_is_not_compiled_again_and_held_against_the_estimate_of_today(tmp_path: Path) -> None:
    results = tmp_path / "known.jsonl"
    results.write_text(json.dumps(row(2**30, 2**30)) + "\n")
    found = fill([POINT], results)
    assert found[POINT.name]["estimated"]["bytes"]["total"] == estimate_of(POINT.config).memory.total


def test_a_point_whose_buffers_alone_have_their_place_is_compiled_to_the_end_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "known.jsonl"
    asked = []

    def measure(_point: Point, quick: bool) -> dict[str, Any]:
        asked.append(quick)
        return row(2**30, 2**30, compiles=None if quick else True)

    monkeypatch.setattr(tpu_compile, "measure", measure)
    for quick in (True, True, False, False, True):
        compiles = fill([POINT], results, quick)[POINT.name]["compiler"]["compiles"]
        assert compiles is (None if len(asked) == 1 else True)
    assert asked == [True, False]


def test_the_last_line_names_what_is_bad_and_what_the_estimate_misses() -> None:
    fine = verdict({POINT.name: row(2**30, 1.1 * 2**30)}, [POINT])
    assert met(fine)
    assert fine["estimate_ratios"] == {POINT.name: 1.1}
    assert "\n" not in last_line(fine)
    placed = verdict({POINT.name: row(2**30, 1.1 * 2**30, compiles=None)}, [POINT])
    assert placed["estimate_ratios"] == {POINT.name: 0.99}, "no code yet"
    off = verdict({POINT.name: row(2**30, 1.2 * 2**30)}, [POINT])
    assert off["estimate_off"] == [POINT.name]
    plain = verdict({POINT.name: row(2**30, 2**30, fused=False)}, [POINT])
    assert plain["bad"] == [POINT.name]
    assert (fine["compiled"], fine["only_placed"]) == (1, [])
    assert (placed["compiled"], placed["only_placed"]) == (0, [POINT.name])
    missing = verdict({}, [POINT])
    assert missing["not_run"] == [POINT.name]
    assert not any(met(result) for result in (off, plain, missing))


def test_the_table_marks_estimates() -> None:
    titles, line = show({POINT.name: row(2**30, 1.1 * 2**30)}).splitlines()
    assert titles.split()[-4:] == ["~ms", "~bound", "~tokens/s", "~MFU"]
    assert line.split()[:5] == [POINT.name, "slice", "2", "fsdp", "8"]
    assert "gather 3 reduce 2" in line.replace("all-", "")
    assert line.split()[-4:] == ["20.00", "HBM", "1,000,000", "0.31"]
