"""Where text comes from: documents of the interpreter's library, of text files, of prompt/response records.

Importable without JAX: the command line calls `check_source` before anything is started.
"""

import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ConfigError
from launcher.data.config import DataConfig

MAX_DOCUMENT = 8192
MIN_DOCUMENT = 256
"""Bytes. Files are cut into whole-line documents between these sizes: small input gives small documents, so that some can be held out."""
DOCUMENTS_WANTED = 64
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "lib2to3",
    "turtledemo",
    "__pycache__",
    "ensurepip",
}


@dataclass(frozen=True)
class Document:
    """UTF-8 text; `prompt` is read but not learned, `text` is learned."""

    text: bytes
    prompt: bytes = b""


@dataclass(frozen=True)
class SourceSummary:
    """What `check_source` found: cheap to have, good to show before a start."""

    source: str
    files: int
    size: int
    """Bytes that would be read at most (data.max_bytes counted in)."""
    records: int | None
    """Records of a jsonl source; None for plain text."""


def check_source(config: DataConfig) -> SourceSummary:
    """Look before anything is started. Raises ConfigError, one line with file, line and remedy, when the source cannot be used.

    Text is checked for existence, readability and UTF-8; every jsonl line is parsed.
    """
    files = source_files(config)
    records: int | None = None
    if config.source == "jsonl":
        records = sum(1 for _ in _read_jsonl(files, config.max_bytes))
        if not records:
            raise ConfigError(f"data.path {config.path}: no records found; write one {_RECORD} a line")
    elif config.source == "text":
        _check_utf8(files, config.max_bytes)
    size = sum(file.stat().st_size for file in files)
    return SourceSummary(config.source, len(files), min(size, config.max_bytes or size), records)


def source_files(config: DataConfig) -> list[Path]:
    """The files of the source in their fixed order. Raises ConfigError when there are none, or one is unreadable, or all are empty."""
    if config.source == "python_stdlib":
        return _stdlib_files()
    path = Path(config.path or "").expanduser()
    if not path.exists():
        raise ConfigError(f"data.path {config.path}: no such file or folder (looked in {Path.cwd()}); give data.path=<file or folder>")
    files = [path] if path.is_file() else _files_below(path, ".jsonl" if config.source == "jsonl" else None)
    for file in files:
        if not os.access(file, os.R_OK):
            raise ConfigError(f"data.path: cannot read {file}: permission denied; change its mode or give another data.path")
    if not files:
        what = "*.jsonl files" if config.source == "jsonl" else "files"
        raise ConfigError(f"data.path {config.path}: the folder holds no {what}; give a file, or a folder that has some")
    if not any(file.stat().st_size for file in files):
        raise ConfigError(f"data.path {config.path}: empty, there is nothing to train on; give data.path=<a file with text>")
    return files


def read_documents(config: DataConfig) -> Iterator[Document]:
    """All documents, in a fixed order. Raises ConfigError as `check_source` does."""
    files = source_files(config)
    if config.source == "jsonl":
        yield from _read_jsonl(files, config.max_bytes)
    elif config.source == "python_stdlib":
        for _, text in _read_texts(files, config.max_bytes):
            yield Document(text)
    else:
        total = sum(file.stat().st_size for file in files)
        size = max(MIN_DOCUMENT, min(MAX_DOCUMENT, min(total, config.max_bytes or total) // DOCUMENTS_WANTED))
        for _, text in _read_texts(files, config.max_bytes):
            yield from (Document(chunk) for chunk in split_lines(text, size))


def split_lines(text: bytes, size: int) -> Iterator[bytes]:
    """Cut text after whole lines into chunks of at most `size` bytes; a longer line is cut between characters."""
    start = 0
    while start < len(text):
        end = min(start + size, len(text))
        if end < len(text):
            newline = text.rfind(b"\n", start, end)
            end = newline + 1 if newline >= start else _character_start(text, end)
        yield text[start:end]
        start = end


def _character_start(text: bytes, end: int) -> int:
    while text[end] & 0xC0 == 0x80:  # a UTF-8 continuation byte
        end -= 1
    return end


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return _files_below(root, ".py")


def _files_below(root: Path, suffix: str | None) -> list[Path]:
    """Visible files below `root`, sorted by their path relative to it, so that the order is the same on every host."""
    found: list[Path] = []
    skipped = _SKIPPED_FOLDERS if suffix == ".py" else {"__pycache__"}
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in skipped and not name.startswith((".", "config-"))]
        found += [Path(folder, name) for name in files if not name.startswith(".") and (suffix is None or name.endswith(suffix))]
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _read_texts(files: list[Path], limit: int | None) -> Iterator[tuple[Path, bytes]]:
    """Files with their text, up to `limit` bytes in all; the last one is cut after a whole line."""
    left = limit
    for file in files:
        text = _read(file)
        _decode(text, file)
        if left is not None and len(text) > left:
            text = text[: text.rfind(b"\n", 0, left) + 1]
            left = 0
        elif left is not None:
            left -= len(text)
        if text:
            yield file, text
        if left == 0:
            return


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"data.path: cannot read {file}: {error.strerror}; give another data.path") from error


def _decode(text: bytes, file: Path) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{file}, line {line}: not UTF-8 text (byte 0x{text[error.start]:02x}); convert it, for example with iconv"
        ) from error


def _check_utf8(files: list[Path], limit: int | None) -> None:
    for _ in _read_texts(files, limit):
        pass


_RECORD = '{"prompt": "...", "response": "..."}'


def _read_jsonl(files: list[Path], limit: int | None) -> Iterator[Document]:
    """Records in file order until `limit` bytes are read. Every refusal names file and line."""
    left = limit
    for file in files:
        text = _read(file)
        _decode(text, file)
        for number, line in enumerate(text.split(b"\n"), start=1):
            if left is not None:
                left -= len(line) + 1
                if left < 0:
                    return
            if line.strip():
                yield _parse_record(line, f"{file}, line {number}")


def _parse_record(line: bytes, where: str) -> Document:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON ({error}); write one {_RECORD} a line") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: expected an object, got {type(record).__name__}; write one {_RECORD} a line")
    for key in ("prompt", "response"):
        if not isinstance(record.get(key), str):
            problem = f"{key!r} is not text" if key in record else f"{key!r} is missing"
            raise ConfigError(f"{where}: {problem}; write one {_RECORD} a line")
    if not record["response"]:
        raise ConfigError(f"{where}: 'response' is empty, there is nothing to learn; fill it or remove the line")
    return Document(text=_utf8(record["response"], where), prompt=_utf8(record["prompt"], where))


def _utf8(text: str, where: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON escapes may hold half of a surrogate pair
        raise ConfigError(
            f"{where}: holds half of a surrogate pair (\\u{ord(text[error.start]):04x}); write the whole character"
        ) from error
