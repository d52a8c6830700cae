"""Documents into rows of fixed length. Pure functions of their input."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from launcher.data.sources import Document
from launcher.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Rows:
    """Packed rows, [N, seq_len + 1] each; one longer than a sequence, since inputs and targets are shifted by one."""

    tokens: NDArray[np.int32]
    segments: NDArray[np.uint16]
    """1, 2, ... for the pieces of documents in a row; 0 is padding."""
    learned: NDArray[np.bool_]
    """Whether predicting this token counts in the loss."""


@dataclass(frozen=True)
class Encoded:
    """One document's tokens without bos, eos included, and which of them are learned."""

    tokens: NDArray[np.int32]
    learned: NDArray[np.bool_]


def encode(document: Document, tokenizer: Tokenizer) -> Encoded:
    prompt, text = tokenizer.encode(document.prompt), tokenizer.encode(document.text)
    tokens = np.concatenate([prompt, text, np.array([tokenizer.eos], np.int32)])
    return Encoded(tokens, np.arange(len(tokens)) >= len(prompt))


def pack(documents: Iterable[Encoded], seq_len: int, bos: int) -> Iterator[Rows]:
    """Fill rows of seq_len + 1 tokens one after another, as blocks of rows.

    A document that does not fit goes on in the next row as a new piece. Every piece begins with bos (a Gemma without it is lost) and
    is a segment of its own; a piece of bos alone is never made. Only the end of a row that has room for less than that is padding.
    """
    builder = _Builder(seq_len + 1)
    for document in documents:
        start = 0
        while start < len(document.tokens):
            taken = builder.add(bos, document.tokens[start:], document.learned[start:])
            start += taken
            if not taken or builder.full:
                yield from builder.next_row()
    yield from builder.finish()


class _Builder:
    """The row being filled, and the block of rows that are full."""

    BLOCK = 1024

    def __init__(self, width: int) -> None:
        self.width = width
        self._clear()

    def _clear(self) -> None:
        self.tokens = np.zeros((self.BLOCK, self.width), np.int32)
        self.segments = np.zeros((self.BLOCK, self.width), np.uint16)
        self.learned = np.zeros((self.BLOCK, self.width), np.bool_)
        self.row = self.at = self.segment = 0

    @property
    def full(self) -> bool:
        return self.at == self.width

    def add(self, bos: int, tokens: NDArray[np.int32], learned: NDArray[np.bool_]) -> int:
        """Put a piece into the row; how many of its tokens went in, 0 when bos and one token have no room."""
        taken = min(len(tokens), self.width - self.at - 1)
        if taken < 1:
            return 0
        self.segment += 1
        end = self.at + 1 + taken
        self.tokens[self.row, self.at] = bos
        self.tokens[self.row, self.at + 1 : end] = tokens[:taken]
        self.segments[self.row, self.at : end] = self.segment
        self.learned[self.row, self.at + 1 : end] = learned[:taken]
        self.at = end
        return taken

    def next_row(self) -> Iterator[Rows]:
        self.row, self.at, self.segment = self.row + 1, 0, 0
        if self.row == self.BLOCK:
            yield Rows(self.tokens, self.segments, self.learned)
            self._clear()

    def finish(self) -> Iterator[Rows]:
        rows = self.row + (self.at > 0)
        if rows:
            yield Rows(self.tokens[:rows], self.segments[:rows], self.learned[:rows])
