"""A host that an earlier process has poisoned: leftovers by which the next one would not get its chips.

A process that still holds an accelerator device, or the lock file that one left behind, lets libtpu fail with "already in use" or hang
(jax-ml/jax#10192).
"""

import contextlib
import logging
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

LOCK_FILE = "libtpu_lockfile"
GRACE_S = 5.0


def clean_host(devices: Path, temp_dir: Path, *, spare: Collection[int] = (), grace: float = GRACE_S) -> list[int]:
    """End every process that holds a device below `devices` and remove the stale lock file in `temp_dir`. Call it only while nothing
    of ours computes.

    `spare`: ids of processes that are left alone. `grace`: seconds between SIGTERM and SIGKILL. Returns the ids of the ended ones.
    """
    holders = [process for process in device_holders(devices) if process.pid not in spare]
    for process in holders:
        logger.warning("process %d holds an accelerator of this host and is ended: %s", process.pid, _command(process))
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, stubborn = psutil.wait_procs(holders, timeout=grace)
    for process in stubborn:
        logger.warning("process %d does not heed SIGTERM and is killed", process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, timeout=grace)
    lock = temp_dir / LOCK_FILE
    if lock.exists():
        lock.unlink(missing_ok=True)
        logger.warning("removed the stale %s", lock)
    return [process.pid for process in holders]


def device_holders(devices: Path) -> Iterator[psutil.Process]:
    """Processes that have an accelerator device open (accel* or vfio/* below `devices`), as far as this user may see."""
    for process in psutil.process_iter():
        try:
            # Not psutil's open_files, which shows regular files only.
            opened = [link.readlink() for link in Path(f"/proc/{process.pid}/fd").iterdir()]
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            continue  # somebody else's, or it ended while we looked
        if any(_is_device(path, devices) for path in opened):
            yield process


def _is_device(path: Path, devices: Path) -> bool:
    return (path.parent == devices and path.name.startswith("accel")) or path.parent == devices / "vfio"


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(" ".join(process.cmdline()).split()) or process.name()
    return "(gone)"
