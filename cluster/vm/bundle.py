"""The bundle: what a VM must have installed to be a host, known by the hash of its content."""

import hashlib
import sys
from importlib.metadata import version
from pathlib import Path


def bundle_hash() -> str:
    """Hash of our own sources, the interpreter's version and the versions of what a host runs.

    Ray refuses hosts whose Python or Ray differs from the head's, so both belong to it.
    """
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for package in ("cluster", "launcher"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(f"python {sys.version_info[:3]}".encode())
    for name in ("ray", "jax", "flax", "optax", "orbax-checkpoint"):
        digest.update(f"{name} {version(name)}".encode())
    return digest.hexdigest()
