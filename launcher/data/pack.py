"""Documents into rows of fixed length. Pure functions of their input."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cluster.errors import ConfigError
from launcher.data.documents import Document
from launcher.data.tokenizer import Tokenizer

OPEN_ROWS = 64
"""How many rows wait for a document that fits what is left of them. With fewer more is padding; each costs a look a document."""
_BATCH = 256
"""Documents given to a tokenizer at once, which uses all processors for it."""


@dataclass(frozen=True)
class Encoded:
    """One document's tokens without bos, and which of them are learned."""

    tokens: NDArray[np.int32]
    learned: NDArray[np.bool_]
    whole: bool = True
    """Whether it is kept in one row wherever it fits one."""


@dataclass
class Row:
    """A packed row, one token longer than a sequence, since inputs and targets are shifted by one."""

    tokens: NDArray[np.int32]
    segments: NDArray[np.uint16]
    """1, 2, ... for the pieces of documents in a row; 0 is padding."""
    learned: NDArray[np.bool_]
    """Whether predicting this token counts in the loss."""
    documents: list[int] = field(default_factory=list)
    """Which document (counted from 0) each segment is of."""
    used: int = 0

    @classmethod
    def empty(cls, width: int) -> "Row":
        return cls(np.zeros(width, np.int32), np.zeros(width, np.uint16), np.zeros(width, np.bool_))

    @property
    def room(self) -> int:
        """For tokens of one more piece, its bos not counted."""
        return max(0, len(self.tokens) - self.used - 1)

    def add(self, bos: int, document: int, tokens: NDArray[np.int32], learned: NDArray[np.bool_]) -> None:
        """Put a piece that has room after what is there."""
        self.documents.append(document)
        end = self.used + 1 + len(tokens)
        self.tokens[self.used] = bos
        self.tokens[self.used + 1 : end] = tokens
        self.segments[self.used : end] = len(self.documents)
        self.learned[self.used + 1 : end] = learned
        self.used = end


def encode(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Raises ConfigError for a conversation when the tokenizer has no tokens for its turns."""
    waiting = iter(documents)
    while batch := list(itertools.islice(waiting, _BATCH)):
        texts = iter(tokenizer.encode([piece.text for document in batch for piece in document.pieces if not piece.control]))
        for document in batch:
            tokens = [
                np.array([control_id(tokenizer, piece.text.decode())], np.int32) if piece.control else next(texts)
                for piece in document.pieces
            ]
            learned = [np.full(len(ids), piece.learned) for ids, piece in zip(tokens, document.pieces, strict=True)]
            if document.closed:
                tokens.append(np.array([tokenizer.eos], np.int32))
                learned.append(np.ones(1, np.bool_))
            yield Encoded(np.concatenate(tokens), np.concatenate(learned), document.whole)


def control_id(tokenizer: Tokenizer, name: str) -> int:
    """Raises ConfigError when the tokenizer has no such control token."""
    found = tokenizer.control(name)
    if found is None:
        raise ConfigError(
            f"data.tokenizer has no control token {name}, which conversations (messages) need; use a tokenizer of Gemma's, "
            "or write prompt and response, or text"
        )
    return found


def pack(documents: Iterable[Encoded], seq_len: int, bos: int) -> Iterator[Row]:
    """Fill rows of seq_len + 1 tokens.

    A document goes into the first of a few rows that has room for all of it. One that may be cut, or that is longer than a row, is cut
    and goes on in the next row as a new piece. Every piece begins with bos (a Gemma without it is lost) and is a segment of its own; a
    piece of bos alone is never made.
    """
    width, rows = seq_len + 1, _OpenRows(seq_len + 1)
    for number, document in enumerate(documents):
        start, length = 0, len(document.tokens)
        while start < length:
            left = length - start
            row = rows.first_with_room(min(left, width - 1) if document.whole else 1)
            end = start + min(left, row.room)
            row.add(bos, number, document.tokens[start:end], document.learned[start:end])
            start = end
            yield from rows.take_full()
    yield from rows.rest()


class _OpenRows:
    """The rows that are being filled, the oldest first."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._open: list[Row] = []
        self._full: list[Row] = []

    def first_with_room(self, tokens: int) -> Row:
        for row in self._open:
            if row.room >= tokens:
                return row
        self._open.append(Row.empty(self._width))
        if len(self._open) > OPEN_ROWS:
            fullest = min(range(OPEN_ROWS), key=lambda i: self._open[i].room)
            self._full.append(self._open.pop(fullest))
        return self._open[-1]

    def take_full(self) -> Iterator[Row]:
        """Rows that are done with."""
        full, self._full = self._full, []
        yield from full
        done = [i for i, row in enumerate(self._open) if row.room == 0]
        for i in reversed(done):
            yield self._open.pop(i)

    def rest(self) -> Iterator[Row]:
        yield from self._open
