"""The files of one run directory, wherever it lies: below a folder, or below a gs:// prefix.

Cloud Storage neither appends to an object nor takes much more than one write a second to the same one. A file that grows is a folder of
segments there, whose names sort by the time they were written; whoever reads it puts them together again.
"""

import errno
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from cluster.cloud_errors import NotFoundError
from cluster.state import write_atomic_bytes
from cluster.storage import PATIENCE_S, Bucket, split_url


class RunFiles(Protocol):
    """Names are relative, with '/'. Every method raises what its place raises: OSError, or CloudError."""

    url: str
    least_interval_s: float
    """How long, in seconds, to wait between two replacements of the same file, and between two looks at it."""
    unheard_s: float
    """For so many seconds after its last status a supervisor may have lived on: while the place did not answer, it went on all the same."""

    def read(self, name: str) -> bytes | None:
        """None when there is no such file."""

    def write(self, name: str, content: bytes) -> None:
        """Replace it at once: a reader sees the old content or the new, never a part."""

    def create(self, name: str, content: bytes) -> bool:
        """Of several callers at once exactly one gets True; the others change nothing."""

    def remove(self, name: str) -> None:
        """Nothing when there is no such file."""

    def append(self, name: str, content: bytes) -> None:
        """Add to a file that only grows; whole lines, since several may add to it at once."""

    def tail(self, name: str) -> "Tail":
        """What a file that only grows says, from its beginning."""

    def read_grown(self, name: str) -> bytes:
        """All of a file that only grows; nothing when there is none."""

    def list(self, folder: str) -> list[str]:
        """The names, relative to `folder`, of all files in it and below; a file that grows counts as one."""


class Tail(Protocol):
    def __call__(self) -> Iterator[bytes]:
        """The whole lines, with their ends, that have come since the last call; a line that is still being written waits for the next."""


class LocalFiles:
    """Below a folder of this machine, or of one that all hosts see."""

    least_interval_s = 0.2
    unheard_s = 0.0

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = str(folder)

    def read(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, content: bytes) -> None:
        write_atomic_bytes(self._made(name), content)

    def create(self, name: str, content: bytes) -> bool:
        # A link appears with its whole content or not at all, and never over another file.
        path = self._made(name)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        partial.write_bytes(content)
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
        finally:
            partial.unlink()
        return True

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def append(self, name: str, content: bytes) -> None:
        # One write call with O_APPEND: a line is never torn by another writer, and a crash loses at most the line being written.
        handle = os.open(self._made(name), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if (written := os.write(handle, content)) < len(content):  # the disk is full: rather nothing than half a line
                os.ftruncate(handle, os.fstat(handle).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        finally:
            os.close(handle)

    def tail(self, name: str) -> Tail:
        return _LocalTail(self.folder / name)

    def read_grown(self, name: str) -> bytes:
        return self.read(name) or b""

    def list(self, folder: str) -> list[str]:
        base = self.folder / folder
        return sorted(path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()) if base.is_dir() else []

    def _made(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class _LocalTail:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        """Bytes, up to the end of a line."""

    def __call__(self) -> Iterator[bytes]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                yield line


SEGMENT = ".segments"
"""A file that grows is the folder `<name>.segments` on Cloud Storage."""


class ObjectFiles:
    """Below a gs:// prefix."""

    least_interval_s = 2.0
    unheard_s = math.inf

    def __init__(
        self, url: str, endpoint: str | None = None, patience: float | None = PATIENCE_S, *, clock: Callable[[], int] = time.time_ns
    ) -> None:
        """`endpoint` and `patience`: as for Bucket. `clock`: nanoseconds since the epoch, which order the segments of several writers."""
        self.url = url.rstrip("/")
        bucket, self._prefix = split_url(self.url)
        self._bucket = Bucket(bucket, endpoint, patience=patience)
        self._clock = clock
        self._last = 0

    def read(self, name: str) -> bytes | None:
        try:
            return self._bucket.read(f"{self._prefix}/{name}")
        except NotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        self._bucket.write(f"{self._prefix}/{name}", content)

    def create(self, name: str, content: bytes) -> bool:
        return self._bucket.create(f"{self._prefix}/{name}", content)

    def upload(self, name: str, path: Path) -> None:
        """Replace it by the content of a local file, however large."""
        self._bucket.upload(path, f"{self._prefix}/{name}")

    def remove(self, name: str) -> None:
        self._bucket.delete(f"{self._prefix}/{name}")

    def append(self, name: str, content: bytes) -> None:
        while not self.create(f"{name}{SEGMENT}/{self._stamp():020d}-{secrets.token_hex(2)}", content):
            pass  # the same name twice: the next has another time

    def tail(self, name: str) -> Tail:
        return _ObjectTail(self._bucket, f"{self._prefix}/{name}{SEGMENT}/")

    def read_grown(self, name: str) -> bytes:
        return b"".join(self.tail(name)())

    def list(self, folder: str) -> list[str]:
        base = f"{self._prefix}/{folder}/" if folder else f"{self._prefix}/"
        found = {name.removeprefix(base).partition(f"{SEGMENT}/")[0] for name in self._bucket.list(base)}
        return sorted(found)

    def _stamp(self) -> int:
        """Later than the one before, whatever the clock does."""
        self._last = max(self._clock(), self._last + 1)
        return self._last


class _ObjectTail:
    def __init__(self, bucket: Bucket, prefix: str) -> None:
        self._bucket, self._prefix = bucket, prefix
        self._seen: set[str] = set()

    def __call__(self) -> Iterator[bytes]:
        for name in sorted(set(self._bucket.list(self._prefix)) - self._seen):
            content = self._bucket.read(name)
            self._seen.add(name)
            yield from content.splitlines(keepends=True)


def open_files(url: str | Path, endpoint: str | None = None, patience: float | None = PATIENCE_S) -> RunFiles:
    """The files at a local path or a gs:// URL. `endpoint` and `patience`: as for Bucket, for gs:// only."""
    return ObjectFiles(str(url), endpoint, patience) if is_object(url) else LocalFiles(Path(url))


def is_object(url: str | Path) -> bool:
    return str(url).startswith("gs://")


class RunRoot:
    """The place that holds run directories, `run.root`."""

    def __init__(self, url: str | Path, endpoint: str | None = None) -> None:
        """`endpoint`: as for Bucket, for gs:// only."""
        self.url = str(url).rstrip("/") if is_object(url) else str(Path(url).absolute())
        self._endpoint = endpoint

    def names(self) -> list[str]:
        """Of the folders that hold a config.yaml, the newest first. Raises OSError or CloudError."""
        if is_object(self.url):
            bucket, prefix = split_url(self.url)
            times = Bucket(bucket, self._endpoint).changed(f"{prefix}/" if prefix else "", "config.yaml")
        else:
            base = Path(self.url)
            times = {path.parent.name: path.stat().st_mtime for path in base.glob("*/config.yaml")} if base.is_dir() else {}
        return sorted(times, key=lambda name: times[name], reverse=True)
