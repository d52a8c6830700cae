"""Programs of Debian's that tests use as a user would: Prometheus, Chromium."""

import os
import shutil
import subprocess

import pytest

_APT = ("apt-get", "-qq", "-o", "DPkg::Lock::Timeout=240")


def program(name: str, package: str) -> str:
    """Its path. Where CI runs it is installed, or the test fails; elsewhere the test is skipped without it."""
    if found := shutil.which(name):
        return found
    if os.environ.get("CI") != "true":
        pytest.skip(f"{name} is not installed: apt-get install {package}")
    for command in (("update",), ("install", "-y", "--no-install-recommends", package)):
        done = subprocess.run(
            [*_APT, *command],
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"apt-get {' '.join(command)}: {done.stderr[-2000:]}"
    found = shutil.which(name)
    assert found, f"{package} brings no {name}"
    return found
