"""The embedding table with its words split over devices: rows, losses and gradients are those of one device, on any mesh."""

import json
import os
import subprocess
import sys

import pytest

from tests.integration import vocabulary_worker
from tests.integration.conftest import ROOT

CASES = [*vocabulary_worker.CASES, "short texts"]


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    """Of eight devices, which this process does not have."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "tests.integration.vocabulary_worker"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, dict[str, float]] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("case", CASES)
def test_words_split_over_a_mesh_give_what_they_give_on_one_device(found: dict[str, dict[str, float]], case: str) -> None:
    one = found[case]
    assert one["apart"] < 2e-5
    if "loss" in one:
        assert one["loss"] > 1
        assert one["gradient"] > 1e-2
