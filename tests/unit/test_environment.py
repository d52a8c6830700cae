"""`.env.example` explains exactly the variables that the code reads, and no secret's value has a way into a config."""

import re
from pathlib import Path

import pytest

from launcher.compose import compose_config, load
from launcher.environment import INTERNAL_VARIABLES, USER_VARIABLES, present, read_dotenv

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for folder in ("launcher", "cluster", "hydra_plugins") for path in (ROOT / folder).rglob("*.py")]


def test_env_example_lists_the_variables_that_a_user_may_set() -> None:
    text = (ROOT / ".env.example").read_text()
    assert set(re.findall(r"^([A-Z_]+)=", text, re.MULTILINE)) == USER_VARIABLES
    blocks = text.strip().split("\n\n")[1:]
    assert all(block.startswith("#") for block in blocks), "every variable is explained by the comment above it"


def test_every_variable_of_ours_in_the_sources_is_declared() -> None:
    found = {name for path in SOURCES for name in re.findall(r"PODLAUNCH_[A-Z_]+", path.read_text())}
    assert found <= USER_VARIABLES | INTERNAL_VARIABLES
    declaration = ROOT / "launcher" / "environment.py"
    used = {name for path in SOURCES if path != declaration for name in re.findall(r"PODLAUNCH_[A-Z_]+", path.read_text())}
    read_by_us = {name for name in USER_VARIABLES | INTERNAL_VARIABLES if name.startswith("PODLAUNCH_")}
    assert read_by_us == used, "declared, but nothing reads or sets it"


def test_secrets_of_the_default_config_are_names_that_env_example_explains() -> None:
    assert set(load(compose_config([])).run.secrets) <= USER_VARIABLES


def test_dotenv_fills_in_what_the_shell_leaves_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("HF_TOKEN=from-file\nWANDB_API_KEY=from-file\n")
    monkeypatch.setenv("HF_TOKEN", "from-shell")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.delenv("WANDB_API_KEY")
    read_dotenv(tmp_path)
    assert present(["HF_TOKEN", "WANDB_API_KEY", "NOT_SET"]) == {"HF_TOKEN": "from-shell", "WANDB_API_KEY": "from-file"}
    monkeypatch.delenv("WANDB_API_KEY")
