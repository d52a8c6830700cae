"""Programs that `tpu train check` has compiled, kept for the runs that would compile the same.

    <cache>/programs/<key>/             on the machine of the check: entries of JAX's persistent compilation cache
    <run>/programs/                     from there, when a run of the same configuration is submitted
    <cache>/compilation/                on every host, before its training process starts

`key_of` only says which may be wanted. Whether an entry is what a process would compile, JAX decides: its own key, which is the file's
name, stands for the whole program, the compiler's build and the slice; who finds no such entry compiles as always.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.state import cache_dir, write_atomic_bytes
from launcher.config import LaunchConfig
from launcher.estimate.step import libtpu_topology
from launcher.run_files import RunFiles

logger = logging.getLogger(__name__)

FOLDER = "programs"
ENTRIES = "jit_train-*-cache"
"""Of the step itself: what else the check's process compiled is for the processor of its machine."""
KEPT = 8
"""Of configurations, the newest; a program takes 7 to 13 MB for Gemma 3 of any size."""


def key_of(config: LaunchConfig) -> str:
    """The same for runs whose training step is the same: the training and the slices, not the run's name or place."""
    slices = config.slices
    step = [config.training_on_slices.to_dict(), libtpu_topology(slices.accelerator), slices.slices]
    return hashlib.sha256(json.dumps(step, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def room_for(config: LaunchConfig) -> Iterator[Path]:
    """An empty folder; what lies in it at the end takes the place of what was kept for `config`. Where an error ends it, that stays; where
    there is no room to keep it, that is all that is lost.
    """
    home = cache_dir() / FOLDER
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=home) as folder:
        yield Path(folder)
        try:
            _keep(Path(folder), home / key_of(config))
        except OSError as error:
            logger.warning("the compiled program is not kept: %s", error)
    by_age = sorted((path for path in home.iterdir() if not path.name.startswith(".")), key=lambda path: path.stat().st_mtime)
    for old in by_age[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _keep(made: Path, kept: Path) -> None:
    if any(made.glob(ENTRIES)):
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(made, kept)


def send(config: LaunchConfig, run: RunFiles) -> None:
    """What is kept for `config`, into the run directory."""
    home = cache_dir() / FOLDER
    for path in sorted((home / key_of(config)).glob(ENTRIES)) if home.is_dir() else []:
        run.write(f"{FOLDER}/{path.name}", path.read_bytes())


def fetch(run: RunFiles, cache: Path) -> None:
    """What the run directory has, into the folder of JAX's persistent compilation cache."""
    for name in run.list(FOLDER):
        if not (cache / name).exists() and (content := run.read(f"{FOLDER}/{name}")) is not None:
            cache.mkdir(parents=True, exist_ok=True)
            write_atomic_bytes(cache / name, content)
