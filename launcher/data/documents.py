"""What a source yields and everything behind it works with: documents, made of pieces that are learned or only read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"


class Place(NamedTuple):
    """Where a document begins."""

    file: Path
    number: int
    """Counted from 1."""
    unit: str = "line"
    """line or row"""

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


NOWHERE = Place(Path(), 0)


@dataclass(frozen=True)
class Piece:
    """UTF-8 text of a document that is learned or not; with `control` the name of one control token."""

    text: bytes
    learned: bool = True
    control: bool = False


@dataclass(frozen=True)
class Document:
    """What belongs together; tokens of one document never see those of another."""

    pieces: tuple[Piece, ...]
    closed: bool = True
    """Whether an end-of-text token follows, which is learned."""
    whole: bool = True
    """Whether it is kept in one row wherever it fits one."""
    place: Place = field(default=NOWHERE, compare=False)

    @property
    def text(self) -> bytes:
        """Of all its pieces, control tokens left out."""
        return b"".join(piece.text for piece in self.pieces if not piece.control)


def plain(text: bytes, place: Place = NOWHERE, *, whole: bool = True) -> Document:
    """Text, all of it learned."""
    return Document((Piece(text),), whole=whole, place=place)


def response(prompt: bytes, text: bytes, place: Place = NOWHERE) -> Document:
    """A prompt that is read, and what is learned to follow it."""
    return Document((Piece(prompt, learned=False), Piece(text)), place=place)


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    """user or model"""
    content: bytes


def conversation(turns: Sequence[Turn], place: Place = NOWHERE) -> Document:
    """In the format of Gemma's chat template; what the model says is learned, and that it ends its turn.

    The template, of any of Google's instruction-tuned Gemma models: `<start_of_turn>ROLE\\nCONTENT<end_of_turn>\\n` for every turn. It has
    no `<eos>`: the model ends a turn by `<end_of_turn>`.
    """
    pieces: list[Piece] = []
    for turn in turns:
        role, learned = f"{turn.role}\n".encode(), turn.role == "model"
        pieces += [
            Piece(START_OF_TURN.encode(), learned=False, control=True),
            *((Piece(role, learned=False), Piece(turn.content)) if learned else (Piece(role + turn.content, learned=False),)),
            Piece(END_OF_TURN.encode(), learned, control=True),
            Piece(b"\n", learned=False),
        ]
    return Document(tuple(pieces), closed=False, place=place)
