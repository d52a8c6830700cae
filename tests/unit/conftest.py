"""What several unit tests share."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import processes
from cluster.emulator.storage import Storage, storage_binary, storage_marker
from cluster.state import private_dir
from cluster.storage import Bucket
from tests.unit.fake_head import cluster, head

__all__ = ["cluster", "endpoint", "head"]


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """Of a Cloud Storage API with the bucket `runs-bucket`."""
    binary = storage_binary()
    assert binary is not None, "the extra dev has it"
    with tempfile.TemporaryDirectory() as folder:
        place = private_dir(Path(folder) / "emulator")
        storage = Storage(place, binary)
        storage.start()
        Bucket("runs-bucket", storage.url, "my-project").ensure()
        yield storage.url
        storage.stop()
        processes.kill_members(storage_marker(place))
