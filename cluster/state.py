"""The user's state directory: what outlives a command. One layout, written here only.

<state>/                       $PODLAUNCH_STATE_DIR, else $XDG_STATE_HOME/podlaunch, else ~/.local/state/podlaunch; mode 0700
  logs/<component>.log         rotating, one a component
  emulator/                    the emulated cloud: its database, its daemon's record, its hosts' folders
  clusters/<name>/             one a cluster: cluster.json, token, the autoscaler's file, the head's daemon record
  runs/<cluster>/              its runs that have not ended (launcher/index.py); stays when the cluster is stopped with its runs kept
"""

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError


def state_dir() -> Path:
    """The state directory, created with mode 0700. Raises ConfigError when it cannot be."""
    given = os.environ.get("PODLAUNCH_STATE_DIR")
    base = Path(given) if given else Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "podlaunch"
    return private_dir(base.absolute())


def logs_dir() -> Path:
    return private_dir(state_dir() / "logs")


def emulator_dir() -> Path:
    return private_dir(state_dir() / "emulator")


def clusters_dir() -> Path:
    return private_dir(state_dir() / "clusters")


def cluster_dir(name: str) -> Path:
    """The folder of one cluster. The name must already be checked; the assertion keeps it from leaving the state directory."""
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?", name), name
    return private_dir(clusters_dir() / name)


def private_dir(path: Path) -> Path:
    """`path`, created where missing, readable by its owner only."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"cannot create {path}: {error.strerror}; set PODLAUNCH_STATE_DIR to a folder that you may write") from error
    return path


def cache_dir() -> Path:
    """What can be made again: $PODLAUNCH_CACHE_DIR, else $XDG_CACHE_HOME/podlaunch, else ~/.cache/podlaunch. Not created here."""
    given = os.environ.get("PODLAUNCH_CACHE_DIR")
    if given:
        return Path(given).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "podlaunch"


def short_dir(key: Path) -> Path:
    """A short private folder for Ray's sockets, one for each `key`.

    A unix socket's path is limited to 107 bytes and Ray spends about 70 of them, so it cannot live under a deep state directory.
    """
    digest = hashlib.sha256(str(key).encode()).hexdigest()[:8]
    path = private_dir(Path(tempfile.gettempdir()) / f"podlaunch-{os.getuid()}" / digest)
    if path.stat().st_uid != os.getuid():
        raise ConfigError(f"{path} belongs to another user; set TMPDIR to a folder of your own")
    return path


def write_atomic(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace `path` at once: a reader sees the old text or the new, never a part."""
    write_atomic_bytes(path, text.encode(), mode)


def write_atomic_bytes(path: Path, content: bytes, mode: int = 0o644) -> None:
    """The same for bytes."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(mode)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None when there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    assert isinstance(value, dict), path
    return value
