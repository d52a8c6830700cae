"""Parquet files, and the folders that Hugging Face `datasets` makes, as records. They need pyarrow, which is an extra.

save_to_disk           state.json names the Arrow files of one split; dataset_dict.json names the splits, one folder each
a repository's folder  parquet files <split>-00000-of-00004.parquet, below data/ or elsewhere, or <split>/*.parquet
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.schema import did_you_mean
from launcher.data.config import FieldsConfig

INDEX_FILES = ("dataset_dict.json", "state.json")
_BATCH_ROWS = 1024
_SHARD = re.compile(r"(.+?)(-\d{5}-of-\d{5}(-[0-9a-f]+)?)?\.parquet")


def rows(file: Path, fields: FieldsConfig) -> Iterator[dict[str, Any]]:
    """The rows of one parquet or Arrow file in their order, with the columns that can matter. Raises ConfigError for an unreadable one."""
    pyarrow = _pyarrow()
    names = [fields.prompt, fields.response, fields.messages, fields.text]
    try:
        for batch in _batches(file, names):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{file}: cannot be read as {_format(file)}: {' '.join(str(error).split())}; write it again") from error


def columns(file: Path) -> list[str]:
    """The names of a file's columns. Raises ConfigError for an unreadable one."""
    pyarrow = _pyarrow()
    try:
        if file.suffix == ".parquet":
            return list(pyarrow.parquet.read_schema(file).names)
        with pyarrow.OSFile(str(file), "rb") as opened:
            return list(pyarrow.ipc.open_stream(opened).schema.names)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{file}: cannot be read as {_format(file)}: {' '.join(str(error).split())}; write it again") from error


def _batches(file: Path, names: Sequence[str]) -> Iterator[Any]:
    pyarrow = _pyarrow()
    if file.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(file) as opened:
            wanted = [name for name in opened.schema_arrow.names if name in names]
            yield from opened.iter_batches(_BATCH_ROWS, columns=wanted)
        return
    with pyarrow.OSFile(str(file), "rb") as source, pyarrow.ipc.open_stream(source) as stream:
        for batch in stream:
            yield batch.select([name for name in batch.schema.names if name in names])


def dataset_files(folder: Path, found: Iterable[Path], split: str, where: str) -> list[Path]:
    """The files of one split of a folder in one of the formats above; `found`: all parquet files below it, sorted.

    Raises ConfigError when it is no such folder, or lacks the split. `where`: the setting, for the line.
    """
    if not folder.is_dir():
        raise ConfigError(f"{where}.path {folder}: give the folder that save_to_disk wrote, or one of parquet files")
    if (folder / "dataset_dict.json").exists():
        splits = _json(folder / "dataset_dict.json").get("splits", [])
        if split not in splits:
            raise ConfigError(f"{where}.split {split!r}: {folder} has no such split{did_you_mean(split, splits)}")
        folder = folder / split
    if (folder / "state.json").exists():
        named = _json(folder / "state.json").get("_data_files", [])
        return [folder / entry["filename"] for entry in named]
    return _parquet_of_split(folder, list(found), split, where)


def _parquet_of_split(folder: Path, files: list[Path], split: str, where: str) -> list[Path]:
    if not files:
        raise ConfigError(
            f"{where}.path {folder}: neither a folder of save_to_disk (no state.json, no dataset_dict.json) nor one with parquet files"
        )
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file, folder), []).append(file)
    if split in by_split:
        return by_split[split]
    if len(by_split) == 1:  # no name of a split, such as part-0.parquet
        return files
    raise ConfigError(f"{where}.split {split!r}: {folder} has no such split{did_you_mean(split, by_split)}")


def _split_of(file: Path, folder: Path) -> str:
    inside = file.relative_to(folder).parts[:-1]
    if inside and inside[-1] != "data":
        return inside[-1]
    name = _SHARD.fullmatch(file.name)
    assert name is not None, "only parquet files are looked for"
    return name[1]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}; save the dataset again") from error
    return value if isinstance(value, dict) else {}


def _format(file: Path) -> str:
    return "parquet" if file.suffix == ".parquet" else "an Arrow stream"


def _pyarrow() -> Any:
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            'parquet files and datasets need pyarrow, which is not installed; run: pip install "podlaunch[parquet]"'
        ) from error
    return pyarrow
