"""Packing, the split, the cache and the batches: pure functions, checked on small data."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer

from cluster.errors import ConfigError
from cluster.state import cache_dir
from launcher.data.batches import EvalBatches, TrainBatches
from launcher.data.cache import Part, open_packed
from launcher.data.config import DataConfig
from launcher.data.documents import plain, response
from launcher.data.pack import Encoded, Row, encode, pack
from launcher.data.packed import PackedSet
from launcher.data.split import document_rank, held_out_limit
from launcher.data.tokenizer import BOS, ByteTokenizer

TOKENIZER = ByteTokenizer()


def text_config(tmp_path: Path, lines: int = 400) -> DataConfig:
    path = tmp_path / "some.txt"
    path.write_text("".join(f"line {i} of a small text\n" for i in range(lines)))
    return DataConfig("text", path=str(path), held_out=0.1)


def test_byte_tokenizer_gives_what_the_tokenizers_library_gives(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    theirs = HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "def f(x):\n\treturn 'ß€😀' # plain\r\n\x00"
    (ours,) = TOKENIZER.encode([text.encode()])
    assert theirs.encode(text).ids == [BOS, *ours.tolist()]
    assert theirs.decode(ours.tolist()) == text == TOKENIZER.decode(ours)
    assert theirs.get_vocab_size() == TOKENIZER.vocab == 262


def test_byte_tokenizer_never_yields_control_tokens_for_text() -> None:
    (ids,) = TOKENIZER.encode([b"<bos><eos><start_of_turn>"])
    assert ids.min() >= 4
    assert ids.max() < 260


def packed(documents: list[Encoded], seq_len: int) -> list[Row]:
    rows = list(pack(documents, seq_len, BOS))
    assert all(row.tokens.shape == (seq_len + 1,) for row in rows)
    return rows


def pieces(rows: list[Row]) -> list[tuple[int, list[int], list[bool]]]:
    """(document, tokens, learned) of every segment, bos left out, which is checked to begin it."""
    found = []
    for row in rows:
        assert row.segments.max() == len(row.documents)
        assert not row.learned[row.segments == 0].any()
        for segment, document in enumerate(row.documents, start=1):
            mine = row.segments == segment
            tokens, learned = row.tokens[mine].tolist(), row.learned[mine].tolist()
            assert tokens[0] == BOS
            assert not learned[0]
            assert len(tokens) >= 2
            found.append((document, tokens[1:], learned[1:]))
    return found


DOCUMENTS = st.lists(st.tuples(st.binary(max_size=20), st.binary(min_size=1, max_size=60), st.booleans()), min_size=1, max_size=12)


@given(DOCUMENTS, st.integers(8, 24))
def test_pack_keeps_every_token_of_every_document_in_order(documents: list[tuple[bytes, bytes, bool]], seq_len: int) -> None:
    made = [response(prompt, text) if whole else plain(text, whole=False) for prompt, text, whole in documents]
    encoded = list(encode(made, TOKENIZER))
    found = pieces(packed(encoded, seq_len))
    for number, document in enumerate(encoded):
        mine = [(tokens, learned) for of, tokens, learned in found if of == number]
        assert [token for tokens, _ in mine for token in tokens] == document.tokens.tolist()
        assert [one for _, learned in mine for one in learned] == document.learned.tolist()
        if document.whole and len(document.tokens) <= seq_len:
            assert len(mine) == 1


def test_text_that_may_be_cut_leaves_no_padding_but_at_the_end() -> None:
    documents = [Encoded(np.arange(4, 4 + n, dtype=np.int32), np.ones(n, np.bool_), whole=False) for n in (5, 30, 2, 17, 9)]
    rows = packed(documents, 15)
    assert all(row.used >= 15 for row in rows[:-1])
    assert [document for document, _, _ in pieces(rows)] == sorted(document for document, _, _ in pieces(rows))


def test_records_are_kept_whole_with_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 1000)
    documents = [Encoded(np.full(n, 7, np.int32), np.ones(n, np.bool_)) for n in lengths]
    rows = packed(documents, 255)
    assert len(pieces(rows)) == 1000
    assert sum(row.used for row in rows) / (256 * len(rows)) > 0.97


def test_only_responses_are_learned(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}? ", "response": f"answer {i}"}) + "\n" for i in range(40)))
    data = open_packed(DataConfig("jsonl", path=str(path), held_out=0.1), TOKENIZER, 40, tmp_path)
    batch = TrainBatches(data.train, 4, seed=0).rows(0, 0, 4)
    learned = TOKENIZER.decode(batch.targets[batch.weights > 0])
    assert "question" not in learned
    assert "answer" in learned


def test_split_is_by_content_and_leaves_neither_side_empty() -> None:
    documents = [plain(f"text {i}".encode()) for i in range(200)]
    ranks = [document_rank(document) for document in documents]
    limit = held_out_limit(ranks, 0.1, "x")
    held_out = [document for document, rank in zip(documents, ranks, strict=True) if rank <= limit]
    assert 5 < len(held_out) < 40
    for fraction in (1e-9, 1 - 1e-9):
        limit = held_out_limit(ranks[:3], fraction, "x")
        assert 0 < sum(rank <= limit for rank in ranks[:3]) < 3
    assert document_rank(plain(b"one two")) != document_rank(plain(b"onetwo"))
    assert document_rank(plain(b"one two\n")) == document_rank(response(b"one ", b" two"))


def test_too_little_data_says_how_much_there_is(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("same\n")
    with pytest.raises(ConfigError, match=r"data=text .*1 documents of which 1 are different; at least 2 are needed"):
        open_packed(DataConfig("text", path=str(tmp_path / "one.txt")), TOKENIZER, 16, tmp_path / "cache")


def test_cache_is_built_once_and_keyed_by_content_and_settings(tmp_path: Path) -> None:
    config, root = text_config(tmp_path), tmp_path / "cache"
    first = open_packed(config, TOKENIZER, 32, root)
    built = (first.folder / "about.json").stat().st_mtime_ns
    again = open_packed(config, TOKENIZER, 32, root)
    assert again.key == first.key
    assert (again.folder / "about.json").stat().st_mtime_ns == built
    assert open_packed(config, TOKENIZER, 64, root).key != first.key
    moved = tmp_path / "moved.txt"
    moved.write_bytes((tmp_path / "some.txt").read_bytes())
    assert open_packed(DataConfig("text", path=str(moved), held_out=0.1), TOKENIZER, 32, root).key == first.key
    moved.write_text("other\n" + moved.read_text())
    assert open_packed(DataConfig("text", path=str(moved), held_out=0.1), TOKENIZER, 32, root).key != first.key
    assert first.train[0].rows.tokens.dtype == np.uint16
    assert isinstance(first.train[0].rows.tokens, np.memmap)


def test_a_build_that_was_killed_is_built_again(tmp_path: Path) -> None:
    config, root = text_config(tmp_path), tmp_path / "cache"
    folder = open_packed(config, TOKENIZER, 32, root).folder
    folder.rename(folder.with_name(f"{folder.name}.building"))
    assert open_packed(config, TOKENIZER, 32, root).train[0].rows.rows > 0
    assert not folder.with_name(f"{folder.name}.building").exists()


def _open_and_count(config: DataConfig, root: Path) -> tuple[str, int]:
    data = open_packed(config, TOKENIZER, 32, root)
    return data.key, data.train[0].rows.rows


def test_processes_that_ask_at_once_get_the_same_cache(tmp_path: Path) -> None:
    config, root = text_config(tmp_path, lines=20_000), tmp_path / "cache"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        answers = pool.starmap(_open_and_count, [(config, root)] * 3)
    assert len(set(answers)) == 1


def test_held_out_documents_are_never_trained_on(tmp_path: Path) -> None:
    data = open_packed(text_config(tmp_path), TOKENIZER, 64, tmp_path / "cache")
    sides = []
    for side in (data.train[0].rows, *data.held_out):
        text = TOKENIZER.decode(np.concatenate([row[row >= 4] for row in np.asarray(side.tokens, np.int32)]))
        sides.append({line for line in text.splitlines() if line.startswith("line ") and line.endswith(" text")})
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("PODLAUNCH_CACHE_DIR", raising=False)
    assert cache_dir() == tmp_path / "xdg" / "podlaunch"
    monkeypatch.setenv("PODLAUNCH_CACHE_DIR", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def numbered(rows: int, width: int = 9) -> PackedSet:
    tokens = np.arange(rows)[:, None].repeat(width, axis=1) + 4
    return PackedSet(tokens, np.ones((rows, width), np.uint16), np.ones((rows, width), np.bool_))


def part(rows: int, weight: float = 1.0) -> Part:
    return Part("data", numbered(rows), weight, (), "line")


@given(st.integers(1, 23), st.integers(1, 40), st.integers(0, 5))
def test_every_row_is_seen_once_an_epoch(rows: int, batch_size: int, seed: int) -> None:
    batches = TrainBatches([part(rows)], batch_size, seed)
    seen = [int(row[0]) - 4 for step in range(2 * rows) for row in batches.rows(step, 0, batch_size).tokens]
    for epoch in range(2):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_a_batch_is_the_same_however_it_is_read() -> None:
    whole = TrainBatches([part(50)], 8, seed=3).rows(11, 0, 8)
    parts = [TrainBatches([part(50)], 8, seed=3).rows(11, start, start + 2) for start in range(0, 8, 2)]
    assert np.array_equal(whole.tokens, np.concatenate([part.tokens for part in parts]))
    assert not np.array_equal(whole.tokens, TrainBatches([part(50)], 8, seed=4).rows(11, 0, 8).tokens)


def test_positions_and_weights_respect_segments() -> None:
    segments = np.array([[1, 1, 1, 2, 2, 3, 3, 0, 0]], np.uint16)
    data = PackedSet(np.arange(9)[None] + 4, segments, np.ones((1, 9), np.bool_))
    batch = TrainBatches([Part("data", data, 1.0, (), "line")], 1, seed=0).rows(0, 0, 1)
    assert batch.positions[0].tolist() == [0, 1, 2, 0, 1, 0, 1, 0]
    assert batch.weights[0].tolist() == [1, 1, 0, 1, 0, 1, 0, 0]


def test_eval_counts_every_row_at_most_once() -> None:
    batches = EvalBatches(numbered(11), 4, limit=10)
    assert batches.count == 3
    counted = [batches.rows(step, 0, 4) for step in range(3)]
    rows = [int(row[0]) - 4 for batch in counted for row, weight in zip(batch.tokens, batch.weights, strict=True) if weight.any()]
    assert rows == list(range(11))
    assert EvalBatches(numbered(100), 4, limit=2).count == 2
