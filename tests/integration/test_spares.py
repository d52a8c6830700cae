"""What a spare does before it has orders, with the real libraries."""

import subprocess
import sys

import pytest

from tests.integration.conftest import ROOT

pytestmark = pytest.mark.timeout(400)

PROGRAM = """
import contextlib, os, time
from launcher.training import spare
spare.import_gently((*spare._TRAINING, *spare.LIBRARIES))
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()

def priorities():
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            yield os.getpriority(os.PRIO_PROCESS, int(thread))

deadline = time.monotonic() + 10
while set(priorities()) != {0}:  # the kernel takes a moment to forget the thread that imported
    assert time.monotonic() < deadline, list(priorities())
    time.sleep(0.1)
"""


def test_what_a_spare_imports_touches_no_device_and_leaves_no_thread_of_low_priority() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, timeout=200, check=True)
