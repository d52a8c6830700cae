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


def run(dictionary: Path, folder: Path, *arguments: str, limit: float) -> dict[str, Any]:
    """The last line of the example, in which both have learned enough, and whose figure shows both."""
    figure = folder / "jargon.svg"
    places = ["--dictionary", str(dictionary), "--root", str(folder / "runs"), "--figure", str(figure)]
    own = {"PODLAUNCH_CACHE_DIR": str(folder / "cache"), "PODLAUNCH_STATE_DIR": str(folder / "state"), "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "jargon.py"), *places, *arguments],
        env={**os.environ, **own, "NO_COLOR": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    shown = figure.read_text(encoding="utf-8")
    for name in ("all weights", "LoRA, rank 16"):
        assert result[name]["improved"] >= ENOUGH, result
        assert name in shown
    return result


@pytest.mark.timeout(900)
def test_all_weights_and_adapters_learn_a_dictionary_in_a_few_steps(dictionary: Path, tmp_path: Path) -> None:
    run(dictionary, tmp_path, "--base-steps", "40", "--steps", "30", limit=800)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_the_example_as_it_is_documented_takes_less_than_ten_minutes_of_two_processors(dictionary: Path, tmp_path: Path) -> None:
    result = run(dictionary, tmp_path, limit=2900)
    assert result["cpu_seconds"] < CPU_LIMIT_S, result
