"""Whatever goes wrong meanwhile, in the end there is what a live cluster owns and nothing else.

One scenario again: PODLAUNCH_SEED=n pytest tests/unit/test_control_plane_random.py
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.scenarios import generate, play

SCENARIOS = 500
_SEED = os.environ.get("PODLAUNCH_SEED")


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path))
    logging.disable(logging.CRITICAL if _SEED is None else logging.NOTSET)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("seed", range(SCENARIOS) if _SEED is None else [int(_SEED)])
def test_nothing_is_left_behind_and_nothing_is_there_twice(seed: int) -> None:
    scenario = generate(seed)
    problems = play(scenario)
    assert not problems, f"\n{scenario}\n\n" + "\n".join(problems)


def test_a_seed_makes_the_same_scenario_every_time() -> None:
    assert str(generate(7)) == str(generate(7)) != str(generate(8))
