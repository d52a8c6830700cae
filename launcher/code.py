"""The code of a run: what its training processes import, stored in the run directory as a content-addressed zip.

    podlaunch/   our own packages, first on the training process's path, so that no module of the user's can shadow them
    user/        the folder that `run.code` names, last on the path

Equal code gives an equal file (fixed times, sorted names), so its hash names the folder that it is unpacked into on a host.
"""

import hashlib
import io
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from cluster.errors import ConfigError
from launcher.data.config import DataConfig

PACKAGES = ("launcher", "cluster")
MAX_BYTES = 100 * 2**20
MAX_DATA_BYTES = 2**30
"""Every host fetches it once, and holds it in memory while it unpacks it."""
_SKIPPED_FOLDERS = frozenset(
    {
        *(".git", ".venv", "venv", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", "node_modules"),
        *("runs", "outputs", "multirun", "checkpoints", "wandb"),
    }
)
_SKIPPED_FILES = frozenset({".env"})
_EPOCH = (1980, 1, 1, 0, 0, 0)


def package_root() -> Path:
    """The folder that holds our packages: a checkout, or site-packages."""
    return Path(__file__).resolve().parent.parent


def pack(user_code: Path | None) -> bytes:
    """The zip of our packages and the user's folder. Raises ConfigError when that is missing or too large."""
    root = package_root()
    files = {f"podlaunch/{path.relative_to(root)}": path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))}
    if user_code is not None:
        files |= {f"user/{path.relative_to(user_code)}": path for path in user_files(user_code)}
    return _zip(files)


def pack_data(config: DataConfig) -> bytes | None:
    """The zip of the files that `config` reads, for hosts that do not see this machine; None when every host has them.

    What the setting i of `config.paths()` names lies in the folder i. Raises ConfigError as `check_data` does, and when it is too large.
    """
    if not config.paths():
        return None
    # Only who launches packs: supervisors and runners, which import this module to unpack, start without NumPy.
    from launcher.data.hf_tokenizer import tokenizer_files
    from launcher.data.sources import files_to_send

    files = {name: files_to_send(source, name) for name, source, _ in config.sources() if source.path is not None}
    found = {f"{name}.path": paths for name, paths in files.items()}
    if config.tokenizer is not None:
        found["data.tokenizer"] = tokenizer_files(config.tokenizer)
    sent: dict[str, Path] = {}
    for i, (setting, place) in enumerate(config.paths().items()):
        base = Path(place).expanduser().parent
        sent |= {f"{i}/{path.relative_to(base).as_posix()}": path for path in found[setting]}
    if (total := sum(path.stat().st_size for path in sent.values())) > MAX_DATA_BYTES:
        limit = MAX_DATA_BYTES // 2**20
        what = ", ".join(f"{setting} {place}" for setting, place in config.paths().items())
        raise ConfigError(f"{what}: {total // 2**20} MiB are too much to be sent along with a run, at most {limit} MiB")
    return _zip(sent)


def sent_paths(config: DataConfig, folder: Path) -> dict[str, str]:
    """Setting -> path of what `pack_data` sent, once it is unpacked in `folder`."""
    return {setting: str(folder / str(i) / Path(place).name) for i, (setting, place) in enumerate(config.paths().items())}


def unpack(archive: bytes, cache: Path) -> Path:
    """The folder below `cache` that holds the zip's content; made once for each content, safe when several ask at once."""
    digest = hashlib.sha256(archive).hexdigest()[:16]
    target = cache / digest
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=cache, prefix=f".{digest}."))
    with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
        zipped.extractall(temporary)
    try:
        temporary.rename(target)
    except OSError:
        if not target.exists():
            raise
        shutil.rmtree(temporary)  # another process was first, with the same content
    return target


def user_files(folder: Path) -> Iterator[Path]:
    """Those of the user's files that are sent to the hosts. Raises ConfigError when the folder is missing or too large."""
    if not folder.is_dir():
        raise ConfigError(f"run.code {folder}: no such folder")
    total = 0
    for base, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        for name in sorted(set(files) - _SKIPPED_FILES):
            path = Path(base) / name
            if not path.is_file():
                continue
            total += path.stat().st_size
            if total > MAX_BYTES:
                advice = "keep data and checkpoints out of it, or choose another folder"
                raise ConfigError(f"run.code {folder} holds more than {MAX_BYTES // 2**20} MiB; {advice}")
            yield path


def _zip(files: Mapping[str, Path]) -> bytes:
    """Names in the archive -> files, in their order."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, path in files.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), path.read_bytes(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
