"""What benchmarks/tunix.py makes of what the compiler said. It runs by hand, in an environment that has Tunix."""

from typing import Any

from benchmarks.tunix import TARGETS, Pair, show, verdict


def said(gib: float, seconds: float) -> dict[str, Any]:
    sizes = dict.fromkeys((f"{kind}_bytes" for kind in ("arguments", "temporaries", "outputs")), gib * 2**30 / 2)
    times = {"seconds": 2 * seconds, "cpu_seconds": seconds, "lowering_seconds": 1.0}
    return {"total_bytes": gib * 2**30, "analysis_bytes": 2 * gib * 2**30, "fused_attention": True, "compiles": True, **sizes, **times}


def test_the_ratios_are_ours_by_theirs_and_the_targets_decide() -> None:
    good, bad = Pair(said(5.0, 100.0), said(13.0, 400.0)), Pair(said(7.0, 100.0), said(13.0, 250.0))
    assert good.ratios == {"bytes": 0.3846, "analysis": 0.3846, "compile": 0.25, "compile_cpu": 0.25}
    assert verdict({"4b": good}, "block")["missed"] == []
    result = verdict({"270m": good, "4b": bad}, "block")
    assert result["missed"] == ["4b bytes", "4b compile"]
    assert result["targets"] == TARGETS


def test_what_was_not_waited_for_is_not_compared() -> None:
    quick = Pair(said(5.0, 100.0) | {"compiles": None}, said(13.0, 400.0))
    assert quick.ratios == {"bytes": 0.3846}
    result = verdict({"4b": quick}, "block")
    assert (result["missed"], result["not_compared"]) == ([], ["4b compile"])


def test_the_table_has_both_of_each_size() -> None:
    lines = show({"4b": Pair(said(5.0, 100.0), said(13.0, 400.0))}).splitlines()
    assert [line.split(",")[1].split()[0] for line in lines[1:]] == ["podlaunch", "Tunix"]
    assert lines[1].split()[2] == "5.00"
