"""The manifest of a checkpoint: checksums of its files, written last. A checkpoint without a manifest that agrees does not count.

Orbax verifies nothing after its commit: flipped bytes restore wrong values silently.
"""

import hashlib
import json
import os
from pathlib import Path

MANIFEST = "manifest.json"
_STAMPED = "_CHECKPOINT_METADATA"
"""Orbax writes the time of its commit into this file after we have hashed; restoring does not depend on it."""


def write_manifest(checkpoint: Path) -> None:
    """Hash every file of a finished checkpoint, then put the manifest in place atomically and durably."""
    files = {str(path.relative_to(checkpoint)): _describe(path) for path in _files(checkpoint)}
    partial = checkpoint / f"{MANIFEST}.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"version": 1, "files": files}, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(checkpoint / MANIFEST)


def verify(checkpoint: Path) -> str | None:
    """None when every file is what the manifest says, else the reason in one line. Extra files are no harm."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return "it has no manifest"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is damaged"
    for name, (size, checksum) in sorted(expected.items()):
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _sha256(path) != checksum:
            return f"the checksum of {name} does not agree"
    return None


def _files(checkpoint: Path) -> list[Path]:
    ours = (MANIFEST, f"{MANIFEST}.partial", _STAMPED)
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name not in ours)


def _describe(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
