"""What a spare does before it has orders, with the real libraries."""

import subprocess
import sys

import pytest

from tests.integration.conftest import ROOT

pytestmark = pytest.mark.timeout(400)


def test_what_a_spare_imports_touches_no_device() -> None:
    program = (
        "import importlib; from launcher.training import spare\n"
        "for name in (*spare._TRAINING, *spare._LIBRARIES): importlib.import_module(name)\n"
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=200, check=True)
