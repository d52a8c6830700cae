"""Where checkpoints lie: a folder of this machine, or objects below a gs:// prefix. Both keep numbered folders with files in them.

A file system renames a folder in one step, so whatever is under way has another name until it is complete. Cloud Storage has no such
rename: there the last object written decides, and a folder without it was never finished.
"""

import errno
import os
import shutil
from base64 import b64encode
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import google_crc32c

from cluster.errors import PodlaunchError

COMMITTED = "commit_success.txt"
"""Orbax's own mark: it refuses to read a gs:// folder without it."""
MANIFEST = "manifest.json"
_PARTIAL = f"{MANIFEST}.partial"
_TEMPORARY = ".orbax-checkpoint-tmp"
"""What Orbax appends to the name of the local folder that it writes before its commit."""
_DELETING = ".deleting"
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Facts:
    """What a file is: its length in bytes, and its CRC-32C as Cloud Storage writes it (big-endian, base64)."""

    bytes: int
    crc32c: str


class StorageError(PodlaunchError):
    """The place of the checkpoints cannot be used or does not answer."""


class Storage(Protocol):
    """One folder with folders in it. Methods raise `errors` when the place does not answer."""

    url: str
    errors: tuple[type[Exception], ...]
    lists_checksums: bool
    """Whether to verify costs a listing only, and is not worth dividing among hosts."""

    def make(self) -> None:
        """Create the folder where that is needed."""

    def names(self) -> list[str]:
        """Of the folders in it."""

    def leftovers(self) -> list[str]:
        """Folders that a process was writing or deleting when it was killed."""

    def facts(self, name: str, files: Collection[str] | None = None) -> dict[str, Facts]:
        """Of these files of the folder `name` (None: all), without those that are not there. Names are relative, with '/'."""

    def read(self, name: str, file: str) -> bytes:
        """Raises FileNotFoundError."""

    def write(self, name: str, file: str, content: bytes) -> None:
        """All of it, or nothing."""

    def finish(self, name: str) -> None:
        """Add to a good folder what a process that was killed right after writing the manifest could not."""

    def rename(self, name: str, new: str) -> None:
        """`new` must not exist."""

    def remove(self, name: str) -> None:
        """The folder with all that is in it. Killed meanwhile, it leaves a leftover, never half a checkpoint that counts."""


def open_storage(url: str) -> Storage:
    """Raises StorageError for a kind of place that is not supported, or whose client is not installed."""
    if url.startswith("gs://"):
        return ObjectStorage(url)
    if "://" in url:
        raise StorageError(f"checkpoints cannot be kept at {url}: use a local path or gs://<bucket>/<folder>")
    return LocalStorage(Path(url))


def is_damage(error: Exception) -> bool:
    """Whether an error of reading says that this file is lost, and not that the place cannot be reached or read at all."""
    return isinstance(error, OSError) and error.errno == errno.EIO


class LocalStorage:
    """A folder of this machine, or one that all hosts have mounted."""

    errors: tuple[type[Exception], ...] = (OSError,)
    lists_checksums = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self.url = str(self._folder)

    def make(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        return [path.name for path in self._folder.iterdir() if path.is_dir()] if self._folder.is_dir() else []

    def leftovers(self) -> list[str]:
        return [name for name in self.names() if _TEMPORARY in name or name.endswith(_DELETING)]

    def facts(self, name: str, files: Collection[str] | None = None) -> dict[str, Facts]:
        base = self._folder / name
        if files is None:
            files = [path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file() and path.name != _PARTIAL]
        return {file: _facts(base / file) for file in files if (base / file).is_file()}

    def read(self, name: str, file: str) -> bytes:
        return (self._folder / name / file).read_bytes()

    def write(self, name: str, file: str, content: bytes) -> None:
        target = self._folder / name / file
        partial = target.with_name(f"{target.name}.partial")
        with partial.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        partial.rename(target)

    def finish(self, name: str) -> None:
        """The rename finished it."""

    def rename(self, name: str, new: str) -> None:
        (self._folder / name).rename(self._folder / new)

    def remove(self, name: str) -> None:
        path = self._folder / name
        if not name.endswith(_DELETING):
            path = path.rename(path.with_name(f"{name}{_DELETING}"))
        shutil.rmtree(path)


class ObjectStorage:
    """Below a gs:// prefix. Lengths and checksums are those that Cloud Storage itself keeps: to verify, no byte is read."""

    lists_checksums = True

    def __init__(self, url: str) -> None:
        # Its client for zonal buckets asks a control API about every bucket first, for a minute where that does not answer.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        try:
            import fsspec
            from aiohttp import ClientError
            from gcsfs.retry import HttpError
        except ImportError as error:
            raise StorageError(f"checkpoints at {url} need the extra gcs: pip install 'podlaunch[gcs]'") from error
        self.url = url.rstrip("/")
        self.errors: tuple[type[Exception], ...] = (OSError, ClientError, HttpError)
        # Other hosts write here too: a listing that was once read says nothing later. Orbax's own client takes this setting as well.
        fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
        self._client: Any = fsspec.filesystem("gcs", finalize_on_close=True)
        self._root = self.url.removeprefix("gs://")

    def make(self) -> None:
        """There are no folders."""

    def names(self) -> list[str]:
        try:
            return [Path(entry["name"]).name for entry in self._client.ls(self._root, detail=True) if entry["type"] == "directory"]
        except FileNotFoundError:
            return []

    def leftovers(self) -> list[str]:
        marked = {path.split("/", 1)[0] for path in self._files("") if path.endswith((f"/{MANIFEST}", f"/{COMMITTED}"))}
        return [name for name in self.names() if name.isdecimal() and name not in marked]

    def facts(self, name: str, files: Collection[str] | None = None) -> dict[str, Facts]:
        found = {path: Facts(int(info["size"]), str(info["crc32c"])) for path, info in self._files(name).items()}
        return found if files is None else {file: found[file] for file in files if file in found}

    def read(self, name: str, file: str) -> bytes:
        return bytes(self._client.cat_file(f"{self._root}/{name}/{file}"))

    def write(self, name: str, file: str, content: bytes) -> None:
        self._client.pipe_file(f"{self._root}/{name}/{file}", content)

    def finish(self, name: str) -> None:
        if COMMITTED not in self._files(name):
            self.write(name, COMMITTED, b"committed by its manifest\n")

    def rename(self, name: str, new: str) -> None:
        for file in self._files(name):  # copied by the server
            self._client.cp_file(f"{self._root}/{name}/{file}", f"{self._root}/{new}/{file}")
        self.remove(name)

    def remove(self, name: str) -> None:
        files = self._files(name)
        marks = [mark for mark in (COMMITTED, MANIFEST) if mark in files]
        for mark in marks:  # first, so that what is left is no checkpoint any more
            self._client.rm_file(f"{self._root}/{name}/{mark}")
        rest = [f"{self._root}/{name}/{file}" for file in files if file not in marks]
        if rest:
            self._client.rm(rest)

    def _files(self, name: str) -> dict[str, dict[str, Any]]:
        """Relative path -> what the service says about the object."""
        base = f"{self._root}/{name}".rstrip("/")
        found: dict[str, dict[str, Any]] = self._client.find(base, detail=True)
        return {path.removeprefix(f"{base}/"): info for path, info in found.items()}


def _facts(path: Path) -> Facts:
    checksum = length = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum = google_crc32c.extend(checksum, block)
            length += len(block)
    return Facts(length, b64encode(checksum.to_bytes(4, "big")).decode())
