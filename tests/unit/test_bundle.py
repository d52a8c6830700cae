"""The bundle: its hash, our own wheel, and how it gets into a bucket once."""

import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster import processes
from cluster.config import ClusterConfig
from cluster.emulator.storage import Storage, storage_binary, storage_marker
from cluster.errors import ClusterError
from cluster.state import private_dir
from cluster.storage import Bucket
from cluster.vm.bundle import BundleLocation, bundle_hash, ensure_bundle, manifest_names
from cluster.vm.wheel import PACKAGES, ROOT, build_wheel, own_files
from cluster.vm.wheelhouse import LOCK_FILE, PYTHON, wheelhouse_key

CONFIG = ClusterConfig(name="c", cloud="emulated", accelerator_type="v4-16", bucket="my-bucket")


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Bucket]:
    binary = storage_binary()
    assert binary is not None
    storage = Storage(private_dir(tmp_path / "emulator"), binary)
    storage.start()
    yield Bucket("my-bucket", storage.url, "my-project", patience=20)
    storage.stop()
    processes.kill_members(storage_marker(tmp_path / "emulator"))


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither pip nor uv has anywhere to get anything from."""
    monkeypatch.setenv("UV_PYTHON_INSTALL_MIRROR", "file:///nowhere")
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def make_cache(folder: Path, *, python: bool = True, wheel: bytes = b"ray") -> Path:
    """A cache as a build leaves it, with one small wheel."""
    wheels = folder / "bundle" / f"wheels-{wheelhouse_key()[:16]}"
    wheels.mkdir(parents=True)
    (wheels / "ray-1-py3-none-any.whl").write_bytes(wheel)
    if python:
        tarfile.open(folder / "bundle" / f"python-{PYTHON}.tar.gz", "w:gz").close()
    return folder


def copy_sources(folder: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package)
    return folder


def ensure(bucket: Bucket, cache: Path) -> BundleLocation:
    return ensure_bundle(CONFIG, lambda _: None, bucket=bucket, cache=cache)


def test_hash_changes_with_content_and_only_with_it(tmp_path: Path) -> None:
    root = copy_sources(tmp_path)
    first = bundle_hash(root)
    assert first == bundle_hash()
    file = root / "cluster" / "vm" / "requirements.lock"
    file.touch()
    (root / "cluster" / "__pycache__").mkdir(exist_ok=True)
    (root / "cluster" / "__pycache__" / "x.pyc").write_text("x")
    (root / "cluster" / ".x.swp").write_text("x")
    assert bundle_hash(root) == first
    for change in ("cluster/vm/requirements.lock", "launcher/app.py"):
        before = bundle_hash(root)
        (root / change).write_text((root / change).read_text() + "\n")
        assert bundle_hash(root) != before
    before = bundle_hash(root)
    (root / "launcher" / "app.py").rename(root / "launcher" / "app2.py")
    assert bundle_hash(root) != before


def test_lock_lies_among_our_files() -> None:
    """So that an installed podlaunch has it too, and the hash covers it."""
    assert dict(own_files())["cluster/vm/requirements.lock"] == (ROOT / "requirements.lock").read_bytes()
    assert "\nray==" in LOCK_FILE.read_text()


def test_own_wheel_is_the_same_every_time_and_complete(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = build_wheel(tmp_path / "a"), build_wheel(tmp_path / "b", copy_sources(tmp_path))
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as wheel:
        names = wheel.namelist()
        record = wheel.read(next(name for name in names if name.endswith("RECORD"))).decode()
        metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert "Name: podlaunch" in metadata
    assert "Provides-Extra: vm" in metadata
    assert {"cluster/vm/host_agent.py", "launcher/gang/runner.py", "cluster/py.typed"} <= set(names)
    assert [line.split(",")[0] for line in record.splitlines()] == names


def test_bundle_is_stored_and_then_costs_nothing(bucket: Bucket, tmp_path: Path) -> None:
    where = ensure(bucket, make_cache(tmp_path / "cache"))
    assert where.blob == manifest_names(bundle_hash())[0]
    stored = bucket.list("files/")
    assert sorted(name.rpartition("/")[2].split("-")[0] for name in stored) == ["podlaunch", "python", "ray"]
    assert ensure(bucket, tmp_path / "nothing-here") == where
    assert not (tmp_path / "nothing-here").exists()


def test_without_a_python_to_send_the_bundle_says_so_and_gets_one_later(bucket: Bucket, tmp_path: Path) -> None:
    said: list[str] = []
    cache = make_cache(tmp_path / "cache", python=False)
    plain = ensure_bundle(CONFIG, said.append, bucket=bucket, cache=cache)
    assert plain.blob == manifest_names(bundle_hash())[1]
    assert said[-1] == f"VMs will need an image with Python {PYTHON}: one to send along could not be downloaded"
    tarfile.open(cache / "bundle" / f"python-{PYTHON}.tar.gz", "w:gz").close()
    shutil.rmtree(next((cache / "bundle").glob("wheels-*")))  # the wheels need not be had again
    assert ensure(bucket, cache).blob == manifest_names(bundle_hash())[0]


def test_two_builders_at_once_agree(bucket: Bucket, tmp_path: Path) -> None:
    one_machine = make_cache(tmp_path / "a")
    caches = [one_machine, one_machine, make_cache(tmp_path / "b", wheel=b"built elsewhere")]
    with ThreadPoolExecutor(3) as pool:
        first, second, third = pool.map(lambda cache: ensure(bucket, cache), caches)
    assert first == second == third
    assert len(bucket.list("bundles/")) == 2  # with a Python and without


def test_deleted_file_is_stored_again(bucket: Bucket, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    where = ensure(bucket, cache)
    lost = next(name for name in bucket.list("files/") if "ray-" in name)
    bucket.delete(lost)
    assert ensure(bucket, cache) == where
    assert bucket.exists(lost)


def test_new_code_stores_only_what_is_new(bucket: Bucket, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    ensure(bucket, cache)
    before = set(bucket.list("files/"))
    root = copy_sources(tmp_path / "changed")
    (root / "cluster" / "new.py").write_text("")
    ensure_bundle(CONFIG, lambda _: None, bucket=bucket, cache=cache, root=root)
    (new,) = set(bucket.list("files/")) - before
    assert "/podlaunch-" in new
    assert len(bucket.list("bundles/")) == 4


def test_download_that_fails_says_why_and_stores_nothing(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"cannot be downloaded: pip wheel: ERROR: .*antlr4.*; check the network") as error:
        ensure(bucket, tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert bucket.list() == []
    assert not list((tmp_path / "cache" / "bundle").glob("wheels-*"))
