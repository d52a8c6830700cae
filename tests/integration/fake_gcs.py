"""The emulated cloud's Cloud Storage, alone: it can be stopped and comes back at the same address with what it held."""

import json
import urllib.request
from pathlib import Path

import pytest

from cluster.emulator.storage import Storage, storage_binary

BUCKET = "test-bucket"


class FakeGcs:
    """One service, one bucket. `environment` is what gcsfs and TensorStore need to find it."""

    def __init__(self, folder: Path) -> None:
        binary = storage_binary()
        if binary is None:
            pytest.skip("there is no fake-gcs-server for this platform")
        (folder / "storage" / BUCKET).mkdir(parents=True)
        self._storage = Storage(folder, binary)
        self.start()
        self.address = self._storage.url
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "FSSPEC_GCS_TOKEN": "anon",
            "GOOGLE_CLOUD_PROJECT": "test-project",
        }

    def start(self) -> None:
        self._storage.start()

    def stop(self) -> None:
        """Connections are refused from now on; what was stored stays."""
        self._storage.stop()

    def objects(self) -> dict[str, int]:
        """Name -> length of every object."""
        with urllib.request.urlopen(f"{self.address}/storage/v1/b/{BUCKET}/o?maxResults=1000", timeout=10) as answer:
            return {item["name"]: int(item["size"]) for item in json.load(answer).get("items", [])}
