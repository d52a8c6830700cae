"""`job.entrypoint`: the command line of a user's own program, which is Python.

train.py --lr 1e-3 --name 'two words'      a file, relative to the folder of the code
-m project.train --lr 1e-3                 a module of that folder, or an installed one
python train.py                            means the same as train.py
"""

import shlex
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_PYTHON = ("python", "python3")


@dataclass(frozen=True)
class Entrypoint:
    """A program and its arguments. Either `file` (a relative path) or `module` is given."""

    file: str | None
    module: str | None
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """One word for it."""
        return PurePosixPath(self.file).stem if self.file else str(self.module).rpartition(".")[2]

    def find(self, folder: Path) -> Path | None:
        """The file in `folder` that would run; None when there is none."""
        if self.file is not None:
            candidates = [self.file]
        else:
            path = str(self.module).replace(".", "/")
            candidates = [f"{path}.py", f"{path}/__main__.py"]
        return next((folder / name for name in candidates if (folder / name).is_file()), None)


def parse_entrypoint(text: str) -> Entrypoint:
    """Raises ValueError, one line without the text itself, for what no Python program is started with."""
    try:
        words = shlex.split(text)
    except ValueError as error:  # an open quotation
        raise ValueError(f"cannot be split into words: {error}") from None
    if words and words[0] in _PYTHON:
        words = words[1:]
    if not words:
        raise ValueError("names no program: give FILE.py or -m MODULE, with its arguments")
    first, *rest = words
    if first == "-m":
        if not rest or not all(part.isidentifier() for part in rest[0].split(".")):
            raise ValueError("-m wants the name of a module, for example -m project.train")
        return Entrypoint(None, rest[0], tuple(rest[1:]))
    if first.startswith("-"):
        raise ValueError(f"{first} is an option of the interpreter, which is started already: give FILE.py or -m MODULE")
    if not first.endswith(".py"):
        raise ValueError(f"{first} is no Python program: give FILE.py or -m MODULE, and start other programs from there with subprocess")
    path = PurePosixPath(first)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{first} is outside of the code that is sent to the hosts: give its path relative to run.code")
    return Entrypoint(str(path), None, tuple(rest))
