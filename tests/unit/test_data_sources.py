"""Sources: what is read, and the one line that says why something cannot be."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from launcher.data.cache import ranks_of
from launcher.data.config import DataConfig
from launcher.data.documents import response
from launcher.data.sources import read_documents, split_lines


def jsonl(path: Path, *records: object) -> DataConfig:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return DataConfig("jsonl", path=str(path))


def refused(config: DataConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        ranks_of(config)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_stdlib_is_real_python_capped_and_in_a_fixed_order() -> None:
    config = DataConfig("python_stdlib", max_bytes=200_000)
    documents = list(read_documents(config))
    total = sum(len(document.text) for document in documents)
    assert 190_000 < total <= 200_000
    assert documents == list(read_documents(config))
    for document in documents[:-1]:
        compile(document.text, "a document", "exec", dont_inherit=True)


def test_stdlib_leaves_out_tests_and_packages() -> None:
    from launcher.data.sources import source_files

    for file in source_files(DataConfig("python_stdlib")):
        assert not {"site-packages", "test", "tests", "idlelib"} & set(file.parts[-4:-1]), file


def test_text_folder_is_read_in_order_and_cut_at_lines(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.txt").write_text("line of text\n" * 2000)
    documents = list(read_documents(DataConfig("text", path=str(tmp_path))))
    assert b"".join(document.text for document in documents) == b"line of text\n" * 2000 + b"second\n"
    assert all(document.text.endswith(b"\n") for document in documents)
    assert len(documents) > 30


@given(st.text(max_size=400).map(str.encode), st.integers(8, 64))
def test_split_lines_loses_nothing_and_cuts_no_character(text: bytes, size: int) -> None:
    chunks = list(split_lines(text, size))
    assert b"".join(chunks) == text
    assert all(0 < len(chunk) <= size for chunk in chunks)
    for chunk in chunks:
        chunk.decode("utf-8")


def test_missing_file_names_it_and_the_remedy(tmp_path: Path) -> None:
    text = refused(DataConfig("text", path=str(tmp_path / "nowhere.txt")))
    assert "nowhere.txt" in text
    assert "data.path=<file or folder>" in text


def test_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert "empty" in refused(DataConfig("text", path=str(tmp_path / "empty.txt")))


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "holds no *.jsonl files" in refused(DataConfig("jsonl", path=str(tmp_path)))


def test_text_that_is_not_utf8_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"fine\nfine\ncaf\xe9\n")
    text = refused(DataConfig("text", path=str(tmp_path / "latin.txt")))
    assert "latin.txt, line 3: not UTF-8" in text
    assert "0xe9" in text


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("x")
    # The operating system's answer, not a mode: root may read everything.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != secret)
    assert "permission denied" in refused(DataConfig("text", path=str(secret)))


def test_jsonl_records_become_prompt_and_text(tmp_path: Path) -> None:
    config = jsonl(tmp_path / "a.jsonl", {"prompt": "2+2=", "response": "4", "source": "ignored"}, {"prompt": "", "response": "ß"})
    assert list(read_documents(config)) == [response(b"2+2=", b"4"), response(b"", "ß".encode())]
    assert [str(document.place) for document in read_documents(config)] == [f"{config.path}, line 1", f"{config.path}, line 2"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "a", "response": ', "not valid JSON"),
        ('["prompt", "response"]', "expected an object, got list"),
        ('{"prompt": "a"}', "'response' is missing"),
        ('{"prompt": 3, "response": "b"}', "'prompt' is not text"),
        ('{"prompt": "a", "response": ""}', "'response' is empty"),
        ('{"prompt": "a", "response": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_broken_jsonl_line_names_file_and_line(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n\n' + line + "\n")
    text = refused(DataConfig("jsonl", path=str(path)))
    assert "bad.jsonl, line 3: " in text
    assert expected in text
