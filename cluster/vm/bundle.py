"""The bundle: what a VM must have installed, known by the hash of its content, and where VMs find it.

gs://BUCKET/bundles/<hash>.json            the manifest: which files it is made of; written last
gs://BUCKET/bundles/<hash>-no-python.json  the same without a Python: enough for images that have the right one
gs://BUCKET/files/<sha256>/<name>          the files: wheels, and a Python; bundles share those that they have in common
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.cloud_errors import NotFoundError
from cluster.config import ClusterConfig
from cluster.schema import build, to_plain
from cluster.state import cache_dir, write_atomic
from cluster.storage import Bucket
from cluster.versions import Versions
from cluster.vm.wheel import ROOT, build_wheel, own_files
from cluster.vm.wheelhouse import PYTHON, locked_wheels, only_builder, portable_python

GOOGLE_STORAGE = "https://storage.googleapis.com"
Progress = Callable[[str], None]
_UPLOADS_AT_ONCE = 4


@dataclass(frozen=True)
class BundleLocation:
    """Where a VM fetches the bundle; travels as metadata, so it holds no secrets."""

    endpoint: str
    """URL of the Cloud Storage API."""
    bucket: str
    blob: str
    """The manifest's name in the bucket."""
    sha256: str
    """Of the manifest, which holds those of all files."""


@dataclass(frozen=True)
class Bundle:
    """What the VMs of a cluster run."""

    hash: str
    location: BundleLocation | None = None
    """Where it is fetched from by VMs whose image does not hold it; None: such VMs refuse to start."""
    versions: Versions | None = None
    """Of whoever brought the cluster up, and so of all of it; None in records from before they were written down."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Bundle":
        return build(cls, values)

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)


def bundle_hash(root: Path = ROOT) -> str:
    """Hash of our own sources, the lock, the interpreter's version and the versions of what a host runs.

    Ray refuses hosts whose Python or Ray differs from the head's, so both belong to it. The lock is one of our files.
    """
    digest = hashlib.sha256()
    for name, content in own_files(root):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    digest.update(f"python {sys.version_info[:3]}".encode())
    for name in ("ray", "jax", "flax", "optax", "orbax-checkpoint"):
        digest.update(f"{name} {version(name)}".encode())
    return digest.hexdigest()


def ensure_bundle(
    config: ClusterConfig, progress: Progress, *, bucket: Bucket | None = None, cache: Path | None = None, root: Path = ROOT
) -> BundleLocation:
    """The bundle of this version in the cluster's bucket; built and stored only when it is not there.

    The bucket is created in the region of the first zone where it does not exist. Two commands at once store one bundle.
    `bucket`, `cache`, `root`: instead of those of `config`, of this user, and where our packages lie.

    Raises CloudError, and ClusterError when something cannot be downloaded.
    """
    assert config.bucket is not None
    bucket = bucket or Bucket(config.bucket, config.storage_endpoint, config.effective_project)
    endpoint = config.storage_endpoint or GOOGLE_STORAGE
    complete, plain = manifest_names(bundle_hash(root))
    stored = _stored(bucket, config)
    found = _usable(bucket, complete, stored)
    if found is None:
        with only_builder(cache or cache_dir(), progress) as folder:
            found = _usable(bucket, plain, stored) or _store(bucket, plain, build_wheel(folder, root), folder, stored, progress)
            with_python = _with_python(bucket, found, complete, folder, stored, progress)
        if with_python is None:
            progress(f"VMs will need an image with Python {PYTHON}: one to send along could not be downloaded")
            return BundleLocation(endpoint, bucket.name, plain, hashlib.sha256(found).hexdigest())
        found = with_python
    return BundleLocation(endpoint, bucket.name, complete, hashlib.sha256(found).hexdigest())


def manifest_names(bundle: str) -> tuple[str, str]:
    """Of the bundle with a Python in it, and without."""
    return f"bundles/{bundle}.json", f"bundles/{bundle}-no-python.json"


def _stored(bucket: Bucket, config: ClusterConfig) -> set[str]:
    """What there is in the bucket, which is made where it is missing."""
    try:
        return {*bucket.list("bundles/"), *bucket.list("files/")}
    except NotFoundError:
        bucket.ensure(config.effective_zones[0].rpartition("-")[0])
        return set()


def _usable(bucket: Bucket, name: str, stored: set[str]) -> bytes | None:
    """The manifest; None when there is none, or when somebody has deleted files that it names."""
    if name not in stored:
        return None
    content = bucket.read(name)
    if {file["blob"] for file in json.loads(content)["files"]} <= stored:
        return content
    bucket.delete(name)
    return None


def _store(bucket: Bucket, name: str, own: Path, folder: Path, stored: set[str], progress: Progress) -> bytes:
    """Build the bundle without a Python and store it. Returns the manifest that counts: ours, or that of who was faster."""
    wheels = [own, *locked_wheels(folder, own, progress)]
    entries = [_entry(path, "wheel") for path in wheels]
    with ThreadPoolExecutor(_UPLOADS_AT_ONCE) as pool:
        for _ in pool.map(lambda path, entry: _upload(bucket, path, entry, stored, progress), wheels, entries):
            pass  # so that the first error is raised
    return _publish(bucket, name, {"python": PYTHON, "files": entries}, folder)


def _with_python(bucket: Bucket, manifest: bytes, name: str, folder: Path, stored: set[str], progress: Progress) -> bytes | None:
    """The manifest of the same bundle with a Python in it; None when that cannot be had."""
    wheels = sorted(folder.glob("wheels-*/*.whl"))
    archive = portable_python(folder, wheels, progress)
    if archive is None:
        return None
    entry = _entry(archive, "python")
    _upload(bucket, archive, entry, stored, progress)
    values = json.loads(manifest)
    return _publish(bucket, name, {**values, "files": [*values["files"], entry]}, folder)


def _entry(path: Path, kind: str) -> dict[str, Any]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"kind": kind, "name": path.name, "blob": f"files/{sha256}/{path.name}", "sha256": sha256, "size": path.stat().st_size}


def _upload(bucket: Bucket, path: Path, entry: dict[str, Any], stored: set[str], progress: Progress) -> None:
    if entry["blob"] in stored:
        return
    if entry["size"] > 10e6:
        progress(f"storing {path.name.split('-')[0]} ({entry['size'] / 1e6:.0f} MB) in gs://{bucket.name}")
    bucket.upload_once(path, entry["blob"])


def _publish(bucket: Bucket, name: str, values: dict[str, Any], folder: Path) -> bytes:
    path = folder / "manifest.json"
    write_atomic(path, json.dumps(values, indent=1, sort_keys=True))
    return path.read_bytes() if bucket.upload_once(path, name) else bucket.read(name)
