"""Mixtures: shares of the batches, no leak of held-out documents between parts, and the names of what a batch holds."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from launcher.code import pack_data, sent_paths, unpack
from launcher.compose import compose_config, load
from launcher.data.batches import CYCLE, EvalBatches, TrainBatches, shares_of
from launcher.data.cache import PackedData, Part, open_packed
from launcher.data.config import DataConfig, PartConfig
from launcher.data.packed import PackedSet
from launcher.data.sources import read_documents
from launcher.data.tokenizer import ByteTokenizer
from launcher.training.held_out import HeldOut, measure
from tests.unit.tokenizer_files import tokenizer_json

TOKENIZER = ByteTokenizer()
REST = "data.parts.rest={source: python_stdlib}"


def write_pairs(path: Path, first: int, last: int) -> str:
    records = [{"prompt": f"question {i}? ", "response": f"answer {i}"} for i in range(first, last)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def mixture(tmp_path: Path, **settings: Any) -> DataConfig:
    parts = {
        "mine": PartConfig("jsonl", path=write_pairs(tmp_path / "mine.jsonl", 0, 300), weight=3),
        "copies": PartConfig("jsonl", path=write_pairs(tmp_path / "copies.jsonl", 200, 500)),
    }
    return DataConfig("mixture", parts=parts, **{"held_out": 0.1, **settings})


def part(rows: int, weight: float) -> Part:
    tokens = np.arange(rows)[:, None].repeat(9, axis=1) + 4
    return Part("x", PackedSet(tokens, np.ones((rows, 9), np.uint16), np.ones((rows, 9), np.bool_)), weight, (), "line")


def words(packed: PackedSet) -> set[str]:
    ids = np.asarray(packed.tokens, np.int32)
    return set(TOKENIZER.decode(ids.ravel()[ids.ravel() >= 4]).replace("question", "\nquestion").splitlines()) - {""}


def test_what_is_held_out_of_one_part_is_trained_on_in_none(tmp_path: Path) -> None:
    data = open_packed(mixture(tmp_path), TOKENIZER, 64, tmp_path / "cache")
    trained = set.union(*(words(part.rows) for part in data.train))
    held_out = set.union(*map(words, data.held_out))
    assert len(trained | held_out) == 500
    assert 20 < len(held_out) < 80
    assert not trained & held_out
    twice = {f"question {i}? answer {i}" for i in range(200, 300)}
    assert twice & held_out
    assert (twice & trained) <= words(data.train[0].rows) & words(data.train[1].rows)
    assert (twice & held_out) == words(data.held_out[0]) & words(data.held_out[1])
    assert data.about["held_out"]["documents"] == len(words(data.held_out[0])) + len(words(data.held_out[1]))


def test_what_is_held_out_of_a_part_is_in_no_order_of_the_file(tmp_path: Path) -> None:
    mine = open_packed(mixture(tmp_path), TOKENIZER, 64, tmp_path / "cache").held_out[0]
    half = PackedSet(*(getattr(mine, name)[: mine.rows // 2] for name in ("tokens", "segments", "learned")))
    numbers = {int(line.split()[-1]) for line in words(half)}
    assert any(number < 100 for number in numbers)
    assert any(number >= 200 for number in numbers)


def packed(rows: int) -> PackedSet:
    return part(rows, 1).rows


def measured(tmp_path: Path, parts: dict[str, int], limit: int) -> tuple[HeldOut, list[int]]:
    """With 2 nats for each token of the first part, 3 of the second and so on; how many batches of each were asked for."""
    asked = []

    def sums_of(batches: EvalBatches) -> tuple[float, float]:
        asked.append(batches.count)
        count = sum(float(batches.rows(k, 0, 4).weights.sum()) for k in range(batches.count))
        return count * (2 + len(asked) - 1), count

    train = tuple(Part(f"data.parts.{name}", packed(1), 1.0, (), "line") for name in parts)
    data = PackedData("", tmp_path, train, tuple(map(packed, parts.values())), {})
    return measure(data, 4, limit, sums_of), asked


def test_the_held_out_loss_is_told_of_each_part_and_of_all_together(tmp_path: Path) -> None:
    found, asked = measured(tmp_path, {"mine": 10, "code": 30}, 100)
    assert found.parts == {"mine": 2.0, "code": 3.0}
    assert found.loss == pytest.approx(2 * 0.25 + 3 * 0.75)
    assert asked == [3, 8]


def test_fewer_batches_are_shared_out_and_change_no_weight_of_a_part(tmp_path: Path) -> None:
    found, asked = measured(tmp_path, {"mine": 400, "code": 1200, "few": 3}, 8)
    assert asked == [1, 5, 1]
    assert found.loss == pytest.approx((2 * 400 + 3 * 1200 + 4 * 3) / 1603)


def test_a_part_of_which_nothing_is_held_out_has_no_loss(tmp_path: Path) -> None:
    found, asked = measured(tmp_path, {"mine": 8, "code": 0}, 8)
    assert (found.parts, found.loss, asked) == ({"mine": 2.0}, 2.0, [2])
    assert measured(tmp_path, {"alone": 8}, 8)[0] == HeldOut(2.0, {})


def test_a_part_without_held_out_documents_is_packed_all_the_same(tmp_path: Path) -> None:
    ranked = sorted(range(100), key=lambda i: _rank(tmp_path, i))
    last = PartConfig("jsonl", path=write_pairs(tmp_path / "last.jsonl", ranked[-1], ranked[-1] + 1))
    all_of_them = PartConfig("jsonl", path=write_pairs(tmp_path / "all.jsonl", 0, 100))
    data = open_packed(DataConfig("mixture", parts={"all": all_of_them, "last": last}), TOKENIZER, 64, tmp_path / "cache")
    assert [side.rows > 0 for side in data.held_out] == [True, False]


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=5))
def testshares_of_follow_the_weights(weights: list[float]) -> None:
    shares = shares_of(weights)
    assert sum(shares) == CYCLE
    for share, weight in zip(shares, weights, strict=True):
        assert share >= 1
        assert abs(share - weight / sum(weights) * CYCLE) <= len(weights)


def test_every_part_is_read_in_its_share_and_whole() -> None:
    batches = TrainBatches([part(100, 3), part(7, 1)], 8, seed=5)
    rows = [row for step in range(CYCLE // 8) for row in batches.ids(step)]
    counts = Counter(rows)
    assert sum(n for (of, _), n in counts.items() if of == 0) == CYCLE * 3 // 4
    assert set(counts) == {(0, i) for i in range(100)} | {(1, i) for i in range(7)}
    for of, size, total in ((0, 100, 7500), (1, 7, 2500)):
        times = {n for (which, _), n in counts.items() if which == of}
        assert times <= {total // size, total // size + 1}
    early = [of for of, _ in rows[:400]]
    assert 0.15 < sum(early) / 400 < 0.35


def test_a_batch_of_a_mixture_is_a_pure_function_of_seed_and_step() -> None:
    parts = [part(50, 1), part(20, 2)]
    whole = TrainBatches(parts, 8, seed=3).rows(1300, 0, 8)
    again = TrainBatches(parts, 8, seed=3)
    split = [again.rows(1300, start, start + 2) for start in range(0, 8, 2)]
    assert np.array_equal(whole.tokens, np.concatenate([batch.tokens for batch in split]))
    assert TrainBatches(parts, 8, seed=4).ids(1300) != again.ids(1300)


def test_a_batch_names_its_documents(tmp_path: Path) -> None:
    data = open_packed(mixture(tmp_path), TOKENIZER, 64, tmp_path / "cache")
    batches = TrainBatches(data.train, 4, seed=0)
    places = batches.places(7)
    batch = batches.rows(7, 0, 4)
    for row in batch.tokens:
        for number in (int(text.split("?")[0]) for text in TOKENIZER.decode(row[row >= 4]).split("question ")[1:]):
            assert f"mine.jsonl, line {number + 1}" in places or f"copies.jsonl, line {number - 199}" in places
    assert len(places) == len(set(places)) > 4


def test_a_part_without_anything_to_train_on_is_refused(tmp_path: Path) -> None:
    parts = {"a": PartConfig("jsonl", path=write_pairs(tmp_path / "a.jsonl", 0, 100)), "b": PartConfig("jsonl", path="")}
    ranked = sorted(range(100), key=lambda i: _rank(tmp_path, i))
    parts["b"] = PartConfig("jsonl", path=write_pairs(tmp_path / "b.jsonl", ranked[0], ranked[0] + 1))
    with pytest.raises(ConfigError, match=r"data.parts.b: all of its 1 documents are held out"):
        open_packed(DataConfig("mixture", parts=parts, held_out=0.3), TOKENIZER, 32, tmp_path / "cache")


def _rank(tmp_path: Path, number: int) -> float:
    from launcher.data.split import document_rank

    config = DataConfig("jsonl", path=write_pairs(tmp_path / "one.jsonl", number, number + 1))
    return document_rank(next(read_documents(config)))


def test_weights_are_no_part_of_the_cache_but_of_the_meaning_of_a_curve(tmp_path: Path) -> None:
    from launcher.config import TrainingConfig
    from launcher.curve import check_same_curve, meaning_of

    config = mixture(tmp_path)
    key = open_packed(config, TOKENIZER, 64, tmp_path / "cache").key
    parts = {**config.parts, "mine": PartConfig("jsonl", path=config.parts["mine"].path, weight=1)}
    other = DataConfig("mixture", parts=parts, held_out=0.1)
    assert open_packed(other, TOKENIZER, 64, tmp_path / "cache").key == key
    before, now = (meaning_of(TrainingConfig.from_dict({"model": {"variant": "gemma3-nano"}, "data": c}), key) for c in (config, other))
    with pytest.raises(ConfigError, match=r"data.parts.mine.weight from 3.* to 1.*run.allow=\[data\]"):
        check_same_curve(before, now, [], "the run")


def test_a_mixture_is_composed_from_the_command_line(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "a.jsonl", 0, 5)
    config = load(compose_config(["data=mixture", f"data.parts.mine={{source: jsonl, path: '{path}', weight: 2}}", REST])).training.data
    assert [(name, source.source, weight) for name, source, weight in config.sources()] == [
        ("data.parts.mine", "jsonl", 2.0),
        ("data.parts.rest", "python_stdlib", 1.0),
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"source": "mixture"}, "data.parts is empty"),
        ({"source": "mixture", "path": "a", "parts": {"a": {"source": "python_stdlib"}}}, "data.path does not belong to data=mixture"),
        (
            {"source": "mixture", "parts": {"a": {"source": "jsnl", "path": "b"}}},
            "data.parts.a.source 'jsnl' is unknown; did you mean",
        ),
        ({"source": "mixture", "parts": {"a": {"source": "text"}}}, "data.parts.a.path is missing"),
        ({"source": "mixture", "parts": {"a": {"source": "python_stdlib", "weight": 0}}}, "data.parts.a.weight 0"),
        ({"source": "python_stdlib", "parts": {"a": {"source": "python_stdlib"}}}, "data.parts belong to data=mixture"),
        ({"source": "jsonl", "path": "a", "records": "chat"}, "data.records 'chat' is unknown"),
        ({"source": "jsonl", "path": "a", "fields": {"promt": "a"}}, "did you mean 'data.fields.prompt'?"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(settings: dict[str, Any], expected: str) -> None:
    from cluster.schema import build

    with pytest.raises(ConfigError) as caught:
        build(DataConfig, settings, "data")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_parts_and_the_tokenizer_travel_with_a_run(tmp_path: Path) -> None:
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "deep" / "a.txt").write_text("some text\n")
    folder = tokenizer_json(tmp_path / "tokenizer")
    parts = {"a": PartConfig("text", path=str(tmp_path / "texts")), "b": PartConfig("jsonl", path=write_pairs(tmp_path / "b.jsonl", 0, 5))}
    config = DataConfig("mixture", parts=parts, tokenizer=str(folder))
    archive = pack_data(config)
    assert archive is not None
    there = config.with_paths(sent_paths(config, unpack(archive, tmp_path / "there")))
    assert all(str(tmp_path / "there") in path for path in there.paths().values())
    for (where, source, _), (_, mine, _) in zip(there.sources(), config.sources(), strict=True):
        assert list(read_documents(source, where)) == list(read_documents(mine, where))
    assert sorted(path.name for path in Path(there.tokenizer or "").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
