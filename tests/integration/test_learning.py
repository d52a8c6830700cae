"""What is learned, by the example that fine-tunes on a dictionary: all weights, and LoRA."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples import jargon
from tests.debian import text

ROOT = Path(__file__).resolve().parents[2]
ENOUGH = 0.1
"""Of the held-out loss."""
CPU_LIMIT_S = 1200
"""Ten minutes of two processors; time itself depends on what else they do."""


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text("dict-jargon", str(jargon.DICTIONARY / "jargon.index"), tmp_path_factory.mktemp("debian")).parent


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_all_weights_and_adapters_learn_a_dictionary_as_documented_in_ten_minutes_of_two_processors(
    dictionary: Path, tmp_path: Path
) -> None:
    figure = tmp_path / "jargon.svg"
    places = ["--dictionary", str(dictionary), "--root", str(tmp_path / "runs"), "--figure", str(figure)]
    own = {"PODLAUNCH_CACHE_DIR": str(tmp_path / "cache"), "PODLAUNCH_STATE_DIR": str(tmp_path / "state"), "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "jargon.py"), *places],
        env={**os.environ, **own, "NO_COLOR": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=2900,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    shown = figure.read_text(encoding="utf-8")
    for name in ("all weights", "LoRA, rank 16"):
        assert result[name]["improved"] >= ENOUGH, result
        assert name in shown
    assert result["cpu_seconds"] < CPU_LIMIT_S, result
