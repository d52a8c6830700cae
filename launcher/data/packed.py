"""Packed rows on disk: written once in one go, memory-mapped by every process of every run.

tokens.npy, segments.npy, learned.npy   [rows, seq_len + 1]
first.npy [rows + 1], documents.npy     the segments of row i are of documents[first[i]:first[i + 1]]
places.npy [documents, 2]               where each document begins: the file of the source, counted from 0, and line or row
"""

import functools
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from launcher.data.pack import Row

_ROWS = ("tokens", "segments", "learned")


@dataclass(frozen=True)
class PackedSet:
    """Rows of one source, memory-mapped: only those that are asked for are read."""

    tokens: NDArray[Any]
    segments: NDArray[Any]
    learned: NDArray[Any]
    folder: Path | None = None

    @property
    def rows(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def seq_len(self) -> int:
        return int(self.tokens.shape[1]) - 1

    @classmethod
    def open(cls, folder: Path) -> "PackedSet":
        tokens, segments, learned = (_load(folder, name) for name in _ROWS)
        return cls(tokens, segments, learned, folder)

    def places(self, row: int) -> list[tuple[int, int]]:
        """(file of the source, line or row in it) of the documents in a row, in their order."""
        assert self.folder is not None
        first, documents, places = _index(self.folder)
        numbers = documents[int(first[row]) : int(first[row + 1])]
        return [(int(file), int(number)) for file, number in places[np.asarray(numbers)]]


class PackedWriter:
    """Writes one set of rows, row by row; `close` completes the files."""

    def __init__(self, folder: Path, width: int, vocab: int) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        # Tokens as two bytes when the vocabulary allows it: half the disk and memory.
        types = {"tokens": np.uint16 if vocab <= 1 << 16 else np.int32, "segments": np.uint16, "learned": np.bool_}
        self._files = {name: _GrowingArray(folder / f"{name}.npy", width, np.dtype(dtype)) for name, dtype in types.items()}
        self._first, self._documents = array("q", [0]), array("q")

    def write(self, rows: Iterable[Row]) -> int:
        """How many there were."""
        count = 0
        for row in rows:
            for name, file in self._files.items():
                file.append(getattr(row, name))
            self._documents.extend(row.documents)
            self._first.append(len(self._documents))
            count += 1
        return count

    def close(self, places: Iterable[tuple[int, int]]) -> None:
        """`places`: of the documents, in the order in which they were packed."""
        for file in self._files.values():
            file.close()
        np.save(self._folder / "first.npy", np.frombuffer(self._first, np.int64))
        np.save(self._folder / "documents.npy", np.frombuffer(self._documents, np.int64))
        np.save(self._folder / "places.npy", np.array(list(places), np.int64).reshape(-1, 2))


class _GrowingArray:
    """A .npy file of [rows, width] whose number of rows is known only at the end: NumPy's header leaves room for it."""

    def __init__(self, path: Path, width: int, dtype: np.dtype[Any]) -> None:
        self._file: BinaryIO = path.open("wb")
        self._width, self._dtype, self._rows = width, dtype, 0
        self._begin = self._write_header()

    def append(self, row: NDArray[Any]) -> None:
        self._file.write(row.astype(self._dtype).tobytes())
        self._rows += 1

    def close(self) -> None:
        self._file.seek(0)
        assert self._write_header() == self._begin
        self._file.close()

    def _write_header(self) -> int:
        header = {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._rows, self._width)}
        npy.write_array_header_1_0(self._file, header)
        return self._file.tell()


def _load(folder: Path, name: str) -> NDArray[Any]:
    values: NDArray[Any] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    return values


@functools.lru_cache(maxsize=8)
def _index(folder: Path) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    return _load(folder, "first"), _load(folder, "documents"), _load(folder, "places")
