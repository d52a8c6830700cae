"""What is trained on: the `data` part of a configuration.

DataConfig                one source, or source=mixture with parts of it; how it is split, which tokenizer reads it
└── parts.<name>          PartConfig: one source of a mixture and its weight
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

from cluster.errors import ConfigError
from cluster.schema import at_least, did_you_mean

STDLIB, MIXTURE = "python_stdlib", "mixture"
SOURCES = (STDLIB, "text", "jsonl", "parquet", "datasets")
RECORDS = ("response", "messages", "text")
"""The kinds of records in jsonl, parquet and datasets."""


@dataclass(frozen=True)
class FieldsConfig:
    """What the fields of a record are called in jsonl, parquet and datasets."""

    prompt: str = "prompt"
    """Read, not learned."""
    response: str = "response"
    """Learned."""
    messages: str = "messages"
    """A conversation: a list of {"role": system | user | assistant, "content": text}."""
    text: str = "text"
    """Plain text, all of it learned."""


@dataclass(frozen=True)
class SourceConfig:
    """Where documents come from."""

    source: str
    """python_stdlib (the interpreter's own library), text, jsonl, parquet (files or folders of them), datasets (a folder that Hugging Face
    `datasets` saved, or one of parquet files with splits), or mixture (several of these: `parts`).
    """
    path: str | None = None
    """A file, or a folder whose files are all read."""
    records: str | None = None
    """What the records hold: response (a prompt and what is to be learned), messages (a conversation) or text; null: as the first one."""
    fields: FieldsConfig = field(default_factory=FieldsConfig)
    split: str = "train"
    """Which split of `datasets` is read; where there are none, all."""
    max_bytes: int | None = None
    """Read only about this much of the source, in a fixed order; null reads all."""

    def check(self, where: str) -> None:
        """Raises ConfigError, one line, for what cannot be. `where`: the setting that this is, for the line."""
        if self.source not in SOURCES:
            raise ConfigError(f"{where}.source {self.source!r} is unknown{did_you_mean(self.source, SOURCES)}")
        if self.source != STDLIB and not self.path:
            raise ConfigError(f"{where}.path is missing: {self.source} reads your own files, give {where}.path=<file or folder>")
        if self.source == STDLIB and self.path:
            raise ConfigError(f"{where}.path does not belong to {STDLIB}; use data=text data.path=... for your own text")
        if self.records is not None and self.records not in RECORDS:
            raise ConfigError(f"{where}.records {self.records!r} is unknown{did_you_mean(self.records, RECORDS)}")
        if self.max_bytes is not None:
            at_least(f"{where}.max_bytes", self.max_bytes, 1)


@dataclass(frozen=True)
class PartConfig(SourceConfig):
    """One source of a mixture."""

    weight: float = 1.0
    """Its share of the training tokens, over the sum of all weights. A part is read again from its beginning when it comes to its end."""


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """Which text is trained on."""

    held_out: float = 0.02
    """The fraction of documents kept out of training, chosen by a hash of each document, so that it never leaks."""
    tokenizer: str | None = None
    """A tokenizer.json, a tokenizer.model (SentencePiece), or a folder in Hugging Face's format that holds one. Null: one token a byte."""
    parts: dict[str, PartConfig] = field(default_factory=dict)
    """Of source=mixture: name -> source."""

    def __post_init__(self) -> None:
        if self.source == MIXTURE:
            self._check_mixture()
        else:
            if self.parts:
                raise ConfigError(f"data.parts belong to data=mixture, not to {self.source}")
            self.check("data")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"data.held_out {self.held_out}: give a fraction between 0 and 1, for example 0.02")

    def check(self, where: str) -> None:
        """As SourceConfig."""
        if self.source not in SOURCES:
            raise ConfigError(f"{where}.source {self.source!r} is unknown{did_you_mean(self.source, (*SOURCES, MIXTURE))}")
        super().check(where)

    def _check_mixture(self) -> None:
        if self.path:
            raise ConfigError("data.path does not belong to data=mixture; give every part its own: data.parts.<name>.path=<file or folder>")
        if not self.parts:
            raise ConfigError(
                "data.parts is empty: give data=mixture its sources, data.parts.<name>={source: jsonl, path: a.jsonl, weight: 1}"
            )
        for name, part in self.parts.items():
            part.check(f"data.parts.{name}")
            if not part.weight > 0:
                raise ConfigError(f"data.parts.{name}.weight {part.weight}: give a positive number")

    def sources(self) -> Iterator[tuple[str, SourceConfig, float]]:
        """(setting, source, weight) of all that is read."""
        if self.source == MIXTURE:
            for name, part in self.parts.items():
                yield f"data.parts.{name}", part, part.weight
        else:
            yield "data", self, 1.0

    def paths(self) -> dict[str, str]:
        """Setting -> path, of everything on disk."""
        own = {f"{where}.path": source.path for where, source, _ in self.sources()} | {"data.tokenizer": self.tokenizer}
        return {name: path for name, path in own.items() if path is not None}

    def with_paths(self, paths: Mapping[str, str]) -> Self:
        """With other paths for these settings."""
        parts = {name: dataclasses.replace(part, path=paths.get(f"data.parts.{name}.path", part.path)) for name, part in self.parts.items()}
        path, tokenizer = paths.get("data.path", self.path), paths.get("data.tokenizer", self.tokenizer)
        return dataclasses.replace(self, path=path, tokenizer=tokenizer, parts=parts)
