"""What VMs install besides our own wheel: the locked wheels for their platform, and a Python of this minor version.

<cache>/bundle/
  lock                     held by whoever builds
  wheels-<key>/            complete once it has this name; <key> is the hash of what they were chosen by
  python-<version>.tar.gz
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ClusterError
from cluster.state import private_dir
from cluster.vm.wheel import own_metadata

Progress = Callable[[str], None]

LOCK_FILE = Path(__file__).parent / "requirements.lock"
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
"""Ray lets no host in whose minor version is another."""
_EXTRA = "vm"
_GLIBC = 35
"""Of Ubuntu 22.04 (2.35), the oldest of the images in use."""
_SOURCE_ONLY = ("antlr4-python3-runtime",)
"""Locked packages that are published without a wheel; pure Python, so that one built here fits there."""
_LARGE = re.compile(r"Downloading (\S+)-[0-9][^-]*-\S+ \(([0-9]{2,}(?:\.[0-9]+)? MB)\)")


def wheelhouse_key() -> str:
    """Hash of all that decides which wheels there are: the lock, our requirements, the Python version."""
    requires = [line for line in own_metadata()[1].splitlines() if line.startswith(("Requires-Dist", "Provides-Extra"))]
    return hashlib.sha256("\n".join([LOCK_FILE.read_text(encoding="utf-8"), *requires, PYTHON, str(_GLIBC)]).encode()).hexdigest()


@contextmanager
def only_builder(cache: Path, progress: Progress) -> Iterator[Path]:
    """The build folder of `cache`, for one command at a time."""
    folder = private_dir(cache / "bundle")
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another command that builds the bundle")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield folder


def locked_wheels(folder: Path, own_wheel: Path, progress: Progress) -> list[Path]:
    """The wheels that `own_wheel` requires on a VM, at the locked versions; downloaded where `folder` does not have them yet.

    Raises ClusterError with pip's own words when they cannot be had. To be called under `only_builder`.
    """
    complete = folder / f"wheels-{wheelhouse_key()[:16]}"
    if not complete.exists():
        partial = folder / "wheels.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        progress("downloading what VMs install: about 500 MB, once for each version of podlaunch and Python")
        for name in _SOURCE_ONLY:
            _pip(["wheel", "--no-deps", "--wheel-dir", str(partial), name], progress)
        options = ["--dest", str(partial), "--find-links", str(partial), "--only-binary=:all:", "--progress-bar=off"]
        _pip(["download", *options, *_platform_options(), f"podlaunch[{_EXTRA}] @ {own_wheel.as_uri()}"], progress)
        (partial / own_wheel.name).unlink()
        for old in folder.glob("wheels-*"):
            shutil.rmtree(old)
        partial.rename(complete)
    return sorted(complete.glob("*.whl"))


def portable_python(folder: Path, wheels: list[Path], progress: Progress) -> Path | None:
    """A Python that runs from any folder, packed; None where it cannot be downloaded. To be called under `only_builder`."""
    packed = folder / f"python-{PYTHON}.tar.gz"
    if packed.exists():
        return packed
    partial = folder / "python.partial"
    shutil.rmtree(partial, ignore_errors=True)
    uv = find_uv(folder, wheels)
    if uv is None:
        return None
    progress(f"downloading a Python {PYTHON} for VMs whose image has another")
    command = [str(uv), "python", "install", "--no-config", "--no-bin", "--install-dir", str(partial)]
    command.append(f"cpython-{PYTHON}-linux-x86_64-gnu")
    env = {**os.environ, "UV_HTTP_RETRIES": "1"}  # where the source is closed off, every start would wait for the others
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, text=True, env=env)
    found = list(partial.glob(f"cpython-{PYTHON}.*"))
    if done.returncode != 0 or not found:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        progress(f"it cannot be had: {said[-1] if said else f'uv ended with code {done.returncode}'}")
        return None
    making = folder / f"{packed.name}.partial"
    with tarfile.open(making, "w:gz", compresslevel=6) as tar:
        for path in sorted(max(found).resolve().iterdir()):
            tar.add(path, arcname=path.name)
    making.replace(packed)
    shutil.rmtree(partial)
    return packed


def find_uv(folder: Path, wheels: list[Path]) -> Path | None:
    """uv as it is installed here, else out of the wheel that VMs get; None where neither runs."""
    beside = Path(sys.executable).parent / "uv"
    found = shutil.which(str(beside)) or shutil.which("uv")
    if found is not None:
        return Path(found)
    wheel = next((path for path in wheels if path.name.startswith("uv-")), None)
    if wheel is None or sys.platform != "linux":
        return None
    program = folder / "uv"
    with zipfile.ZipFile(wheel) as archive:
        inside = next(name for name in archive.namelist() if name.endswith(".data/scripts/uv"))
        program.write_bytes(archive.read(inside))
    program.chmod(0o700)
    return program


def _platform_options() -> list[str]:
    """pip takes every tag that would do, one by one; the best first."""
    tags = [f"manylinux_2_{minor}_x86_64" for minor in range(_GLIBC, 16, -1)]
    tags += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    platforms = [word for tag in tags for word in ("--platform", tag)]
    abi = "cp" + PYTHON.replace(".", "")
    return [*platforms, "--python-version", PYTHON, "--implementation", "cp", "--abi", abi, "--abi", "abi3", "--abi", "none"]


def _pip(arguments: list[str], progress: Progress) -> None:
    command = [sys.executable, "-m", "pip", arguments[0], "--disable-pip-version-check", "--no-input", "-c", str(LOCK_FILE), *arguments[1:]]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line.strip())
            if (large := _LARGE.search(line)) is not None:
                progress(f"downloading {large[1]} ({large[2]})")
    if process.returncode != 0:
        errors = [line for line in said if line.startswith("ERROR") and line != "ERROR: Exception:"] or [line for line in said if line][-1:]
        raise ClusterError(
            f"what VMs install cannot be downloaded: pip {arguments[0]}: {' '.join(errors)}; check the network and try again"
        )
