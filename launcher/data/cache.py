"""The packed token cache: tokenized and packed once, then memory-mapped by every process of every run.

    <cache>/packed/<key>/          $PODLAUNCH_CACHE_DIR, else $XDG_CACHE_HOME/podlaunch, else ~/.cache/podlaunch
      about.json                   what the key was made of, and the counts
      train/ held_out/             tokens.npy, segments.npy, learned.npy: [rows, seq_len + 1]

The key covers the content of the source, the tokenizer, the sequence length and the split, so a folder never goes stale: other
content gives another folder. It is built in a temporary folder under a lock and renamed when complete.
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from cluster.errors import ConfigError
from cluster.state import cache_dir
from launcher.data.config import DataConfig
from launcher.data.pack import Encoded, Rows, encode, pack
from launcher.data.sources import Document, read_documents
from launcher.data.split import document_rank, held_out_limit
from launcher.data.tokenizer import Tokenizer

FORMAT = 1
"""Counts up whenever the same input would give other rows."""
TRAIN, HELD_OUT = "train", "held_out"


@dataclass(frozen=True)
class PackedSet:
    """One side of the split, memory-mapped: only the rows that are asked for are read."""

    tokens: NDArray[Any]
    segments: NDArray[Any]
    learned: NDArray[Any]

    @property
    def rows(self) -> int:
        return int(self.tokens.shape[0])

    @classmethod
    def open(cls, folder: Path) -> "PackedSet":
        names = ("tokens", "segments", "learned")
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names))


@dataclass(frozen=True)
class PackedData:
    """Both sides, and the key that names them."""

    key: str
    folder: Path
    train: PackedSet
    held_out: PackedSet


def open_packed(config: DataConfig, tokenizer: Tokenizer, seq_len: int, root: Path | None = None) -> PackedData:
    """The packed data of a source, built first when it is not there. Raises ConfigError when the source cannot be used.

    Any number of processes and runs may ask at once: one builds, the others wait.
    """
    documents = list(read_documents(config))
    key = packed_key(config, documents, tokenizer, seq_len)
    parent = (root or cache_dir()) / "packed"
    folder = parent / key
    if not folder.exists():
        _make_folder(parent)
        with _locked(parent / f"{key}.lock"):
            if not folder.exists():
                _build(folder, config, documents, tokenizer, seq_len)
    return PackedData(key, folder, PackedSet.open(folder / TRAIN), PackedSet.open(folder / HELD_OUT))


def packed_key(config: DataConfig, documents: Iterable[Document], tokenizer: Tokenizer, seq_len: int) -> str:
    """A digest of everything that decides the rows; the path of the source is not part of it."""
    settings = {"format": FORMAT, "tokenizer": tokenizer.fingerprint, "seq_len": seq_len, "held_out": config.held_out}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for document in documents:
        digest.update(len(document.prompt).to_bytes(8, "big") + len(document.text).to_bytes(8, "big"))
        digest.update(document.prompt)
        digest.update(document.text)
    return digest.hexdigest()[:32]


def _build(folder: Path, config: DataConfig, documents: list[Document], tokenizer: Tokenizer, seq_len: int) -> None:
    ranks = [document_rank(document) for document in documents]
    limit = held_out_limit(ranks, config.held_out, _describe(config))
    sides = {
        TRAIN: [document for document, rank in zip(documents, ranks, strict=True) if rank > limit],
        HELD_OUT: [document for document, rank in zip(documents, ranks, strict=True) if rank <= limit],
    }
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)  # left by a builder that was killed; the lock is ours
    about: dict[str, Any] = {"format": FORMAT, "source": _describe(config), "seq_len": seq_len, "held_out": config.held_out}
    for name, side in sides.items():
        encoded = (encode(document, tokenizer) for document in side)
        rows = _write(building / name, encoded, tokenizer, seq_len)
        about[name] = {"documents": len(side), "rows": rows}
    (building / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    building.rename(folder)


def _write(folder: Path, documents: Iterable[Encoded], tokenizer: Tokenizer, seq_len: int) -> int:
    """Write the rows of one side; how many there are."""
    folder.mkdir(parents=True)
    blocks = list(_narrow(pack(documents, seq_len, tokenizer.bos), tokenizer.vocab))
    rows = sum(len(block.tokens) for block in blocks)
    for name in ("tokens", "segments", "learned"):
        first = getattr(blocks[0], name)
        target = open_memmap(folder / f"{name}.npy", mode="w+", dtype=first.dtype, shape=(rows, seq_len + 1))
        start = 0
        for block in blocks:
            target[start : start + len(block.tokens)] = getattr(block, name)
            start += len(block.tokens)
        target.flush()
    return rows


def _narrow(blocks: Iterable[Rows], vocab: int) -> Iterator[Rows]:
    """Tokens as two bytes when the vocabulary allows it: half the disk and memory."""
    for block in blocks:
        tokens = block.tokens.astype(np.uint16) if vocab <= 1 << 16 else block.tokens
        yield Rows(tokens, block.segments, block.learned)  # type: ignore[arg-type]  # stored narrower than computed


def _describe(config: DataConfig) -> str:
    return f"data={config.source}" + (f" data.path={config.path}" if config.path else "")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot create the cache folder {folder}: {error.strerror}; set PODLAUNCH_CACHE_DIR to a writable one"
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """An exclusive lock that the kernel frees when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
