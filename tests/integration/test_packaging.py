"""A wheel carries everything: packages, conf/ and Hydra's hook."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.vm.bundle import bundle_hash

ROOT = Path(__file__).resolve().parents[2]
PACKAGED = ("launcher", "cluster", "conf", "hydra_plugins")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("wheel")
    source = base / "source"
    source.mkdir()
    for name in PACKAGED:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(base), str(source)], check=True, timeout=300)
    (wheel,) = base.glob("podlaunch-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(base / "site"), str(wheel)], check=True, timeout=300)
    return base / "site"


def run(installed: Path, tmp_path: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    # Before the checkout that this environment has installed.
    env = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1", "PODLAUNCH_STATE_DIR": str(tmp_path / "state")}
    return subprocess.run(
        [sys.executable, *arguments],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_the_wheel_holds_every_config_file(installed: Path) -> None:
    wanted = {
        path.relative_to(ROOT) for path in (ROOT / "conf").rglob("*.yaml") if "local" not in path.relative_to(ROOT / "conf").parts[:-1]
    }
    assert wanted
    assert all((installed / path).is_file() for path in wanted)


def test_the_installed_command_composes_from_its_own_conf(installed: Path, tmp_path: Path) -> None:
    result = run(installed, tmp_path, str(installed / "bin" / "podlaunch"), "--cfg", "job")
    assert result.returncode == 0, result.stderr
    program = "from launcher import compose as c; print(c.__file__); print(c.load(c.compose_config([])).cluster.name)"
    result = run(installed, tmp_path, "-c", program)
    assert result.returncode == 0, result.stderr
    file, name = result.stdout.splitlines()
    assert Path(file).is_relative_to(installed)
    assert name == "local"


def test_console_scripts_are_made(installed: Path) -> None:
    assert {path.name for path in (installed / "bin").iterdir()} >= {"tpu", "podlaunch"}


def test_an_installation_makes_the_same_bundle_as_the_checkout(installed: Path, tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from cluster.vm import bundle, wheel, wheelhouse; print(bundle.__file__); print(bundle.bundle_hash()); "
        "print(wheel.build_wheel(Path('.')).name); print(wheelhouse.LOCK_FILE.read_text())"
    )
    result = run(installed, tmp_path, "-c", program)
    assert result.returncode == 0, result.stderr
    file, found, wheel, *lock = result.stdout.splitlines()
    assert Path(file).is_relative_to(installed)
    assert found == bundle_hash()
    assert (tmp_path / wheel).stat().st_size > 100_000
    assert "\n".join(lock).strip() == (ROOT / "requirements.lock").read_text().strip()
