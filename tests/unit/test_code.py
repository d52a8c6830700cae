"""The code of a run: content-addressed, complete, free of secrets."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from launcher import code


def test_equal_code_gives_an_equal_file() -> None:
    assert code.pack(None) == code.pack(None)


def test_the_users_folder_travels_without_secrets_and_results(tmp_path: Path) -> None:
    user = tmp_path / "mine"
    for name in ("tools.py", "sub/more.py", ".env", "runs/x/checkpoint", "__pycache__/tools.pyc"):
        (user / name).parent.mkdir(parents=True, exist_ok=True)
        (user / name).write_text("x = 1\n")
    archive = tmp_path / "code.zip"
    archive.write_bytes(code.pack(user))
    names = [name for name in zipfile.ZipFile(archive).namelist() if name.startswith("user/")]
    assert names == ["user/tools.py", "user/sub/more.py"]


def test_a_missing_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        code.pack(Path("nowhere"))


def test_a_folder_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "MAX_BYTES", 10)
    (tmp_path / "big").write_bytes(b"x" * 11)
    with pytest.raises(ConfigError, match="keep data and checkpoints out"):
        code.pack(tmp_path)


def test_unpacked_packages_stand_before_the_users_modules(tmp_path: Path) -> None:
    """A user's own launcher.py and cluster.py shadow nothing, not even where they are the working directory."""
    user = tmp_path / "user"
    user.mkdir()
    for name in ("launcher", "cluster", "conf"):
        (user / f"{name}.py").write_text("raise RuntimeError('shadowed')\n")
    archive = code.pack(user)
    unpacked = code.unpack(archive, tmp_path / "cache")
    assert code.unpack(archive, tmp_path / "cache") == unpacked
    env = {"PYTHONPATH": str(unpacked / "podlaunch"), "PYTHONSAFEPATH": "1"}
    program = "import launcher.runs, cluster.state; print(launcher.runs.__file__)"
    result = subprocess.run([sys.executable, "-c", program], env=env, cwd=user, capture_output=True, text=True, check=True, timeout=60)
    assert Path(result.stdout.strip()).is_relative_to(unpacked)


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [("launcher.gang.runner", {"ray", "numpy", "jax"}), ("launcher.gang.supervisor", {"numpy", "jax", "cluster.clusters"})],
)
def test_what_every_start_waits_for_imports_nothing_large_that_it_does_not_need(module: str, unwanted: set[str]) -> None:
    program = f"import sys, {module}; print(*sorted({unwanted!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=code.package_root(), capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.split() == []
