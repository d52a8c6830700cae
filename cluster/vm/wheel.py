"""Our own wheel, made of the files that run now: the same from a checkout as from an installation, and the same every time.

It holds what VMs run and no more: the configuration tree and Hydra's hook stay where the user is.
"""

import base64
import hashlib
import zipfile
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from cluster.errors import ConfigError

PACKAGES = ("cluster", "launcher")
ROOT = Path(__file__).resolve().parents[2]
"""Where our packages lie."""
_EARLIEST = (1980, 1, 1, 0, 0, 0)
"""A zip file knows no time before."""
_WHEEL = "Wheel-Version: 1.0\nGenerator: podlaunch\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def own_files(root: Path = ROOT) -> Iterator[tuple[str, bytes]]:
    """Name in the wheel and content of every file of our packages, in order."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            hidden = any(part == "__pycache__" or part.startswith(".") for part in path.relative_to(root).parts)
            if path.is_file() and not hidden and not path.name.endswith((".pyc", "~")):
                yield path.relative_to(root).as_posix(), path.read_bytes()


def own_metadata() -> tuple[str, str]:
    """Our version and METADATA. Raises ConfigError in a checkout that is not installed."""
    for found in distributions(name="podlaunch"):
        # A build leaves an .egg-info in the checkout, which hides the installation from whoever runs there; it has no such file.
        if metadata := found.read_text("METADATA"):
            return found.version, metadata
    raise ConfigError("podlaunch is not installed here, so its requirements are not known: pip install -e .")


def build_wheel(folder: Path, root: Path = ROOT) -> Path:
    """Write the wheel into `folder`."""
    version, metadata = own_metadata()
    info = f"podlaunch-{version}.dist-info"
    files = [*own_files(root), (f"{info}/METADATA", metadata.encode()), (f"{info}/WHEEL", _WHEEL.encode())]
    rows = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in files]
    record = "\n".join([*rows, f"{info}/RECORD,,", ""])
    path = folder / f"podlaunch-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in [*files, (f"{info}/RECORD", record.encode())]:
            entry = zipfile.ZipInfo(name, _EARLIEST)
            entry.external_attr, entry.compress_type = 0o100644 << 16, zipfile.ZIP_DEFLATED
            wheel.writestr(entry, content)
    return path


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
