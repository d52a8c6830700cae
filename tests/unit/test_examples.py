"""The examples' own parts; what they train is tests/integration/test_learning.py."""

import gzip
import json
import shlex
from pathlib import Path

from examples import jargon

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = {
    "00-database-short": "00-database-short\n     The Jargon File\n",
    "foo": "foo\n /foo/\n\n    1. interj. Term of disgust.\n\n    2. See {bar}.\n\n",
    "café": "café\n n.\n\n    A place *with* coffee.\n\n" * 40,
    "empty": "empty\n",
}


def write_dictionary(folder: Path) -> None:
    """As `dictfmt` writes it."""
    texts, index = b"", ""
    for word, text in ENTRIES.items():
        index += f"{word}\t{digits(len(texts))}\t{digits(len(text.encode()))}\n"
        texts += text.encode()
    (folder / "jargon.dict.dz").write_bytes(gzip.compress(texts))
    (folder / "jargon.index").write_text(index, encoding="utf-8")


def digits(value: int) -> str:
    known = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return (digits(value // 64) if value >= 64 else "") + known[value % 64]


def test_a_dictionary_becomes_records_of_terms_and_definitions(tmp_path: Path) -> None:
    write_dictionary(tmp_path)
    assert jargon.write_records(tmp_path, tmp_path / "jargon.jsonl") == 2
    foo, cafe = (json.loads(line) for line in (tmp_path / "jargon.jsonl").read_text(encoding="utf-8").splitlines())
    assert foo == {"prompt": "foo\n", "response": "/foo/\n\n1. interj. Term of disgust.\n\n2. See {bar}."}
    assert cafe["prompt"] == "café\n"
    assert cafe["response"].startswith("n.\n\nA place *with* coffee.")


def test_the_page_shows_the_commands_that_the_example_runs() -> None:
    text = " ".join((ROOT / "docs" / "fine-tuning.md").read_text().replace("\\\n", " ").split())
    for command in jargon.commands(Path("runs/jargon.jsonl"), Path("runs"), jargon.BASE_STEPS, jargon.STEPS).values():
        assert shlex.join(command) in text
