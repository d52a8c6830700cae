"""One compilation cache for all tests of a process: what XLA has compiled for one emulated host serves those of later clusters too."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path


@functools.cache
def compilations() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="podlaunch-test-compilations-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def share_compilations(cache: Path) -> None:
    """`cache`: a PODLAUNCH_CACHE_DIR that does not exist yet."""
    cache.mkdir(parents=True)
    (cache / "compilation").symlink_to(compilations(), target_is_directory=True)
