"""A slice that lacks a host is replaced, by what Ray itself knows of its hosts, while the API goes on to say READY."""

import json
import shutil
import signal
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import Home, eventually

pytestmark = pytest.mark.timeout(300)
GRACE_S = 8


@pytest.fixture
def grown() -> Iterator[Home]:
    """A cluster of one slice that is always there."""
    base = Path(tempfile.mkdtemp(prefix="podlaunch-test-"))
    (base / "work").mkdir()
    home = Home(base / "work", base / "state")
    started = home.tpu("start", "--slices", "1", "local", f"host_grace={GRACE_S}s", "boot_grace=90s", limit=240)
    assert started.returncode == 0, started.stderr
    assert len(ready(home)) == 1
    yield home
    home.tpu("stop", "-y", limit=120)
    for process in home.processes():
        process.send_signal(signal.SIGKILL)
    shutil.rmtree(base)


def ready(home: Home) -> list[str]:
    """The slices of which both hosts have joined."""
    rows = json.loads(home.tpu("status", "--json").stdout)
    return [item["name"] for item in rows[0]["slices"] if item["hosts_ready"] == 2]


def ask(home: Home, path: str, values: dict[str, Any]) -> None:
    admin = json.loads((home.state / "emulator" / "endpoint.json").read_text())["admin"]
    request = urllib.request.Request(admin + path, data=json.dumps(values).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=10):
        pass


@pytest.mark.parametrize("action", ["kill", pytest.param("hang", marks=pytest.mark.long)])
def test_a_slice_whose_second_host_dies_or_hangs_is_replaced(grown: Home, action: str) -> None:
    (before,) = ready(grown)
    ask(grown, "/host", {"node": before, "worker": 1, "action": action})
    eventually(lambda: [name for name in ready(grown) if name != before] != [], "another slice has joined", limit=200)
    log = "".join(path.read_text() for path in (grown.state / "logs").glob("node-provider-*"))
    assert f"deleting slice {before} in us-central2-b: host 1 of 2 is gone for" in log
