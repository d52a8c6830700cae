"""What tests take from Debian: programs, used as a user would (Prometheus, Chromium), and texts."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_APT = ("apt-get", "-qq", "-o", "DPkg::Lock::Timeout=240")


def program(name: str, package: str) -> str:
    """Its path. Where CI runs it is installed, or the test fails; elsewhere the test is skipped without it."""
    if found := shutil.which(name):
        return found
    _only_in_ci(f"{name} is not installed: apt-get install {package}")
    with _one_apt():
        _run(*_APT, "update")
        _run(*_APT, "install", "-y", "--no-install-recommends", package)
    found = shutil.which(name)
    assert found, f"{package} brings no {name}"
    return found


def text(package: str, file: str, room: Path) -> Path:
    """A file (absolute, as it is when installed) of a package that has nothing but texts. Where CI runs it is unpacked into `room`, or the
    test fails, without the servers that it would be installed with; elsewhere the test is skipped where it is not installed.
    """
    if Path(file).exists():
        return Path(file)
    _only_in_ci(f"there is no {file}: apt-get install {package}")
    with _one_apt():
        _run(*_APT, "update")
        _run(*_APT, "download", package, cwd=room)
    (archive,) = room.glob(f"{package}_*.deb")
    _run("dpkg-deb", "-x", str(archive), str(room))
    return room / file.lstrip("/")


def _only_in_ci(reason: str) -> None:
    if os.environ.get("CI") != "true":
        pytest.skip(reason)


@contextmanager
def _one_apt() -> Iterator[None]:
    """Its update does not wait for that of another test; freed by the kernel when the test is killed."""
    with (Path(tempfile.gettempdir()) / "podlaunch-tests-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(*command: str, cwd: Path | None = None) -> None:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-2000:]}"
