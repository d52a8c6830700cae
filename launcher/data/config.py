"""What is trained on: the `data` part of a configuration."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from cluster.errors import ConfigError
from cluster.schema import at_least, did_you_mean

SOURCES = ("python_stdlib", "text", "jsonl")


@dataclass(frozen=True)
class DataConfig:
    """Which text is trained on."""

    source: str
    """python_stdlib (the interpreter's own library), text (a file or folder), jsonl (prompt/response records)."""
    path: str | None = None
    """Where `text` and `jsonl` read: a file, or a folder whose files are all read."""
    held_out: float = 0.02
    """The fraction of documents kept out of training, chosen by a hash of each document, so that it never leaks."""
    max_bytes: int | None = None
    """Read only about this much of the source, in a fixed order; null reads all."""

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ConfigError(f"data.source {self.source!r} is unknown{did_you_mean(self.source, SOURCES)}")
        if self.source != "python_stdlib" and not self.path:
            raise ConfigError(f"data.path is missing: data={self.source} reads your own file, give data.path=<file or folder>")
        if self.source == "python_stdlib" and self.path:
            raise ConfigError("data.path does not belong to data=python_stdlib; use data=text data.path=... for your own text")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"data.held_out {self.held_out}: give a fraction between 0 and 1, for example 0.02")
        if self.max_bytes is not None:
            at_least("data.max_bytes", self.max_bytes, 1)

    def paths(self) -> dict[str, str]:
        """Setting -> path, of everything on disk."""
        return {} if self.path is None else {"data.path": self.path}

    def with_paths(self, paths: Mapping[str, str]) -> Self:
        """With other paths for these settings."""
        return dataclasses.replace(self, path=paths.get("data.path", self.path))
