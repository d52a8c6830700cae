"""Where text comes from: documents of the interpreter's library, of text files, of records in jsonl, parquet and datasets.

Importable without JAX: the command line looks at all of it before anything is started (launcher/data/check.py).
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import ConfigError
from launcher.data.config import STDLIB, SourceConfig
from launcher.data.documents import Document, Place, plain
from launcher.data.records import Records
from launcher.data.tables import INDEX_FILES, columns, dataset_files, rows

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
_SUFFIXES = {"jsonl": ".jsonl", "parquet": ".parquet", "datasets": ".parquet"}
_READ_BYTES = 1 << 20


def read_documents(source: SourceConfig, where: str = "data") -> Iterator[Document]:
    """All documents, in a fixed order. `where`: the setting that this source is, for error lines.

    Raises ConfigError, one line with file, line or row, field and remedy, when the source cannot be used.
    """
    files = source_files(source, where)
    match source.source:
        case "jsonl":
            documents = _read_jsonl(files, source)
        case "parquet" | "datasets":
            documents = _read_tables(files, source)
        case _:
            documents = _read_texts(files, source)
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        place = f"{where}.path {source.path}" if source.path else f"{where}.source {source.source}"
        few = f" in its first {source.max_bytes} bytes ({where}.max_bytes)" if source.max_bytes else ""
        raise ConfigError(f"{place}: no documents found{few}, there is nothing to train on; give a file that has some")


def content_digest(source: SourceConfig, where: str) -> bytes:
    """A digest of all that `read_documents` reads, wherever it lies. Much faster than to read documents. Raises ConfigError too."""
    digest = hashlib.sha256()
    limit = source.max_bytes if source.source not in ("parquet", "datasets") else None
    left = limit
    for file in source_files(source, where):
        size = file.stat().st_size if left is None else min(file.stat().st_size, left)
        digest.update(size.to_bytes(8, "big"))
        done = 0
        with file.open("rb") as opened:
            while done < size and (block := opened.read(min(_READ_BYTES, size - done))):
                digest.update(block)
                done += len(block)
        if left is not None:
            left -= size
            if left == 0:
                break
    return digest.digest()


def source_files(source: SourceConfig, where: str = "data") -> list[Path]:
    """The files of the source in their fixed order. Raises ConfigError when there are none, or one is unreadable, or all are empty."""
    if source.source == STDLIB:
        return _files_below(Path(sysconfig.get_path("stdlib")), ".py")
    path, suffix = Path(source.path or "").expanduser(), _SUFFIXES.get(source.source)
    if not path.exists():
        raise ConfigError(
            f"{where}.path {source.path}: no such file or folder (looked in {Path.cwd()}); give {where}.path=<file or folder>"
        )
    if source.source == "datasets":
        files = dataset_files(path, _files_below(path, suffix) if path.is_dir() else [], source.split, where)
    else:
        files = [path] if path.is_file() else _files_below(path, suffix)
    for file in files:
        if not file.exists():
            raise ConfigError(f"{where}.path {source.path}: {file} is missing; copy the whole folder")
        if not os.access(file, os.R_OK):
            raise ConfigError(f"{where}.path: cannot read {file}: permission denied; change its mode or give another {where}.path")
    if not files:
        what = f"*{suffix} files" if suffix else "files"
        raise ConfigError(f"{where}.path {source.path}: the folder holds no {what}; give a file, or a folder that has some")
    if not any(file.stat().st_size for file in files):
        raise ConfigError(f"{where}.path {source.path}: empty, there is nothing to train on; give {where}.path=<a file with text>")
    return files


def files_to_send(source: SourceConfig, where: str) -> list[Path]:
    """All files that a host needs to read the source. Raises ConfigError as `source_files` does."""
    files = source_files(source, where)
    if source.source == "datasets":
        folder = Path(source.path or "").expanduser()
        files += [path for inside in ("", source.split) for name in INDEX_FILES if (path := folder / inside / name).exists()]
    return files


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


def _files_below(root: Path, suffix: str | None) -> list[Path]:
    """Visible files below `root`, sorted by their path relative to it, so that the order is the same on every host."""
    found: list[Path] = []
    skipped = _SKIPPED_FOLDERS if suffix == ".py" else {"__pycache__"}
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in skipped and not name.startswith((".", "config-"))]
        found += [Path(folder, name) for name in files if not name.startswith(".") and (suffix is None or name.endswith(suffix))]
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _read_texts(files: list[Path], source: SourceConfig) -> Iterator[Document]:
    """Files up to `max_bytes` in all, the last one cut after a whole line. A file of the library is a document, of others a few."""
    left = source.max_bytes
    total = sum(file.stat().st_size for file in files)
    size = max(MIN_DOCUMENT, min(MAX_DOCUMENT, min(total, left or total) // DOCUMENTS_WANTED))
    for file in files:
        text = _read(file)
        _decode(text, file)
        if left is not None and len(text) > left:
            text = text[: text.rfind(b"\n", 0, left) + 1]
            left = 0
        elif left is not None:
            left -= len(text)
        line = 1
        for chunk in split_lines(text, len(text) if source.source == STDLIB else size):
            yield plain(chunk, Place(file, line), whole=False)
            line += chunk.count(b"\n")
        if left == 0:
            return


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}; give another file") from error


def _decode(text: bytes, file: Path) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{file}, line {line}: not UTF-8 text (byte 0x{text[error.start]:02x}); convert it, for example with iconv"
        ) from error


def _read_jsonl(files: list[Path], source: SourceConfig) -> Iterator[Document]:
    """Records in file order until `max_bytes` are read."""
    left, records = source.max_bytes, Records(source)
    for file in files:
        try:
            lines = file.open("rb")
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror}; give another file") from error
        with lines:
            for number, line in enumerate(lines, start=1):
                if left is not None:
                    left -= len(line)
                    if left < 0:
                        return
                if line.strip():
                    place = Place(file, number)
                    yield records.read(_parse(line, place, records), place)


def _parse(line: bytes, place: Place, records: Records) -> object:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: not UTF-8 text (byte 0x{line[error.start]:02x}); convert it, for example with iconv") from error
    except ValueError as error:
        raise ConfigError(f"{place}: not valid JSON ({error}); write one {records.example} a line") from error


def _read_tables(files: list[Path], source: SourceConfig) -> Iterator[Document]:
    left, records = source.max_bytes, Records(source)
    for file in files:
        _check_columns(file, source)
        for number, row in enumerate(rows(file, source.fields), start=1):
            document = records.read(row, Place(file, number, "row"))
            if left is not None:
                left -= len(document.text)
                if left < 0:
                    return
            yield document


def _check_columns(file: Path, source: SourceConfig) -> None:
    """Of the columns only those that can matter are read: say here which there are when none of them does."""
    fields, found = source.fields, columns(file)
    if not {fields.response, fields.messages, fields.text} & set(found):
        raise ConfigError(
            f"{file}: none of the columns {fields.response!r}, {fields.messages!r}, {fields.text!r} is there (found: "
            f"{', '.join(map(repr, found[:8]))}); name yours with data.fields.prompt=... data.fields.response=..., "
            "data.fields.messages=... or data.fields.text=..."
        )
