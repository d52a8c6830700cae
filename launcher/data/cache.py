"""The packed token cache: tokenized and packed once, then memory-mapped by every process of every run.

    <cache>/packed/<key>/          $PODLAUNCH_CACHE_DIR, else $XDG_CACHE_HOME/podlaunch, else ~/.cache/podlaunch
      about.json                   what the key was made of, and the counts
      train-<i>/                   the rows of each source (launcher/data/packed.py)
      held_out-<i>/                what is kept out of training of each source, in the order of a hash: any part of it stands for the whole

The key covers the content of the sources, the tokenizer, the sequence length and the split, so a folder never goes stale: other
content gives another folder. It is built in a temporary folder under a lock and renamed when complete.
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.state import cache_dir
from launcher.data.config import DataConfig, SourceConfig
from launcher.data.documents import Document
from launcher.data.pack import Encoded, encode, pack
from launcher.data.packed import PackedSet, PackedWriter
from launcher.data.sources import content_digest, read_documents, source_files
from launcher.data.split import document_rank, held_out_limit
from launcher.data.tokenizer import Tokenizer

FORMAT = 3
"""Counts up whenever the same input would give other rows."""
HELD_OUT = "held_out"


@dataclass(frozen=True)
class Part:
    """The training rows of one source."""

    setting: str
    """Which part of the configuration it is, for messages."""
    rows: PackedSet
    weight: float
    files: tuple[Path, ...]
    """Of the source, in their order."""
    unit: str
    """What the numbers of places count: line or row."""

    def places(self, row: int) -> list[str]:
        """Where the documents of a row begin."""
        return [f"{self.files[file].name}, {self.unit} {number}" for file, number in self.rows.places(row)]


@dataclass(frozen=True)
class PackedData:
    """Both sides of the split, and the key that names them."""

    key: str
    folder: Path
    train: tuple[Part, ...]
    held_out: tuple[PackedSet, ...]
    """Of each part, in their order; one may have nothing that is held out."""
    about: dict[str, Any]
    """The counts: for each part and for all held-out documents, documents, rows, and how many were cut."""


def open_packed(config: DataConfig, tokenizer: Tokenizer, seq_len: int, root: Path | None = None) -> PackedData:
    """The packed data of a configuration, built first when it is not there. Raises ConfigError when a source cannot be used.

    Any number of processes and runs may ask at once: one builds, the others wait.
    """
    key = packed_key(config, tokenizer, seq_len)
    parent = (root or cache_dir()) / "packed"
    folder = parent / key
    if not folder.exists():
        _make_folder(parent)
        with _locked(parent / f"{key}.lock"):
            if not folder.exists():
                _build(folder, config, tokenizer, seq_len, key)
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    parts = tuple(_open_part(folder, i, *source) for i, source in enumerate(config.sources()))
    held_out = tuple(PackedSet.open(folder / f"{HELD_OUT}-{i}") for i in range(len(parts)))
    return PackedData(key, folder, parts, held_out, about)


def packed_key(config: DataConfig, tokenizer: Tokenizer, seq_len: int) -> str:
    """A digest of everything that decides the rows; where the sources lie, and how often each is read, is no part of it."""
    settings = {"format": FORMAT, "tokenizer": tokenizer.fingerprint, "seq_len": seq_len, "held_out": config.held_out}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for where, source, _ in config.sources():
        own = {"source": source.source, "records": source.records, "fields": vars(source.fields), "max_bytes": source.max_bytes}
        digest.update(json.dumps(own, sort_keys=True).encode())
        digest.update(content_digest(source, where))
    return digest.hexdigest()[:32]


def ranks_of(config: DataConfig) -> list["array[float]"]:
    """The rank of every document of every source; reads, and so checks, them all. Raises ConfigError as `read_documents` does."""
    return [array("d", map(document_rank, read_documents(source, where))) for where, source, _ in config.sources()]


def split_limit(config: DataConfig, ranks: Iterable["array[float]"]) -> float:
    """One limit for all sources: what is held out of one is trained on in none. Raises ConfigError when one has nothing to train on."""
    parts = list(ranks)
    limit = held_out_limit([rank for part in parts for rank in part], config.held_out, _describe(config))
    for (where, _, _), part in zip(config.sources(), parts, strict=True):
        if max(part) <= limit:
            raise ConfigError(
                f"{where}: all of its {len(part)} documents are held out, none is left to train on; add some, or lower data.held_out"
            )
    return limit


def _build(folder: Path, config: DataConfig, tokenizer: Tokenizer, seq_len: int, key: str) -> None:
    ranks = ranks_of(config)
    limit = split_limit(config, ranks)
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)  # left by a builder that was killed; the lock is ours
    about: dict[str, Any] = {"format": FORMAT, "source": _describe(config), "seq_len": seq_len, "held_out": config.held_out, "parts": {}}
    held_out: Counter[str] = Counter()
    for i, (where, source, _) in enumerate(config.sources()):
        kept: list[tuple[float, Document]] = []
        side = _Side(building / f"train-{i}", source_files(source, where), tokenizer, seq_len)
        about["parts"][where] = side.write(_training(read_documents(source, where), ranks[i], limit, kept))
        kept.sort(key=lambda entry: entry[0])
        held_out.update(_Side(building / f"{HELD_OUT}-{i}", [], tokenizer, seq_len).write(document for _, document in kept))
    about[HELD_OUT] = dict(held_out)
    (building / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    if packed_key(config, tokenizer, seq_len) != key:
        raise ConfigError(f"{_describe(config)}: it was changed while it was read; start again when nobody writes to it")
    building.rename(folder)


def _training(documents: Iterable[Document], ranks: "array[float]", limit: float, kept: list[tuple[float, Document]]) -> Iterator[Document]:
    """Those that are trained on; the others go to `kept`."""
    for document, rank in zip(documents, ranks, strict=False):  # of different lengths when the source was changed meanwhile, which is told
        if rank > limit:
            yield document
        else:
            kept.append((rank, document))


class _Side:
    """The rows of one source's training documents, or of those that are held out."""

    def __init__(self, folder: Path, files: list[Path], tokenizer: Tokenizer, seq_len: int) -> None:
        self._numbers = {file: i for i, file in enumerate(files)}
        self._tokenizer, self._seq_len = tokenizer, seq_len
        self._writer = PackedWriter(folder, seq_len + 1, tokenizer.vocab)
        self._places: list[tuple[int, int]] = []
        self._cut = self._tokens = 0

    def write(self, documents: Iterable[Document]) -> dict[str, int]:
        """The counts."""
        encoded = self._counted(encode(self._placed(documents), self._tokenizer))
        rows = self._writer.write(pack(encoded, self._seq_len, self._tokenizer.bos))
        self._writer.close(self._places)
        return {"documents": len(self._places), "tokens": self._tokens, "rows": rows, "cut": self._cut}

    def _placed(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            self._places.append((self._numbers.get(document.place.file, -1), document.place.number))
            yield document

    def _counted(self, documents: Iterable[Encoded]) -> Iterator[Encoded]:
        for document in documents:
            self._tokens += len(document.tokens)
            self._cut += document.whole and len(document.tokens) > self._seq_len
            yield document


def _open_part(folder: Path, index: int, where: str, source: SourceConfig, weight: float) -> Part:
    unit = "row" if source.source in ("parquet", "datasets") else "line"
    return Part(where, PackedSet.open(folder / f"train-{index}"), weight, tuple(source_files(source, where)), unit)


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
