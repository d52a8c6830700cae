"""What a machine and a Google Cloud project lack to run podlaunch, each with what mends it. Starts, changes and costs nothing."""

import resource
import shutil
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from cluster.config import ClusterConfig
from cluster.errors import PodlaunchError
from cluster.services import connect
from cluster.state import cache_dir, state_dir
from cluster.storage import Bucket
from cluster.tpu.api import TpuApi
from cluster.tpu.slices import HEAD_ROLE, ROLE_LABEL, SECRET_ROLE

LEAST_FREE_BYTES = 5 * 2**30
"""Checkpoints, packed data and Ray's sessions of a first run, with room."""
FULL_SHARE = 0.95
"""Ray places nothing on a host whose disk is fuller (RAY_local_fs_capacity_threshold)."""
LEAST_MEMORY_BYTES = 4 * 2**30
"""A local cluster: 1.2 GB for the head, 0.5 GB for each of two hosts, and their training processes."""
LEAST_SHARED_BYTES = 512 * 2**20
"""The object stores of a head and two hosts."""
LEAST_FILES = 1024
MOST_CLOCK_S = 60.0
"""Google refuses tokens that were made minutes ahead of its clock."""
PATIENCE_S = 10.0


@dataclass(frozen=True)
class Finding:
    """What one check says."""

    name: str
    well: bool
    said: str
    fix: str = ""
    """What to do, where it is not well."""


def check_machine() -> Iterator[Finding]:
    yield check_python(sys.version_info[:2])
    yield check_packages(requires("podlaunch") or (), _installed)
    yield check_folder("state directory", state_dir())
    yield check_folder("cache", cache_dir())
    yield check_memory(psutil.virtual_memory().available)
    yield check_shared_memory(Path("/dev/shm"))
    yield check_files(resource.getrlimit(resource.RLIMIT_NOFILE))
    yield check_addresses("127.99.0.1")


def check_cloud(config: ClusterConfig) -> Iterator[Finding]:
    """The services that the cluster would use. They are only asked to list; what may be made there shows when something is made."""
    services = connect(config)
    yield _asked("Cloud TPU API", lambda: _slices(config))
    if config.effective_head == "vm":
        yield _asked("Compute Engine API", lambda: f"{len(services.instances.list({ROLE_LABEL: HEAD_ROLE}))} head VMs")
        yield _asked("Secret Manager API", lambda: f"{len(services.secrets.list({ROLE_LABEL: SECRET_ROLE}))} secrets of ours")
    if config.bucket is not None:
        bucket = Bucket(config.bucket, config.storage_endpoint, patience=PATIENCE_S)
        yield _asked(f"bucket {config.bucket}", lambda: f"{len(bucket.list('runs/index/'))} unfinished runs are listed in it")
    elif config.effective_head == "vm":
        fix = "set PODLAUNCH_BUCKET, or give cluster.bucket=<name>: VMs install from it, and runs live in it"
        yield Finding("bucket", False, "none is set", fix)
    yield check_clock(config.compute_endpoint or "https://tpu.googleapis.com", _skew)
    gcloud = shutil.which("gcloud")
    fix = "install the Google Cloud CLI; only `tpu ssh`, `tpu exec` and the tunnel to a head VM need it"
    yield Finding("gcloud", gcloud is not None, gcloud or "not found", fix)


def check_python(found: Sequence[int]) -> Finding:
    return Finding("Python", (3, 11) <= tuple(found) < (3, 14), ".".join(map(str, found)), "use Python 3.11, 3.12 or 3.13")


def check_packages(needed: Sequence[str], installed: Callable[[str], str | None]) -> Finding:
    """`needed`: requirements as in the metadata of a package, of which those of extras are passed over."""
    wrong = []
    for text in needed:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = installed(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found or 'missing'}, {requirement.specifier or 'any version'} is needed")
    return Finding("packages", not wrong, "; ".join(wrong) or "all there", "pip install -c requirements.lock -e . in a virtual environment")


def check_folder(name: str, folder: Path) -> Finding:
    """Whether it, or what it will be made in, takes files, and has room."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    variable = "PODLAUNCH_STATE_DIR" if name.startswith("state") else "PODLAUNCH_CACHE_DIR"
    elsewhere = f"set {variable} to a folder on another disk"
    try:
        with tempfile.TemporaryFile(dir=place):
            usage = shutil.disk_usage(place)
    except OSError as error:
        return Finding(name, False, f"{folder}: {error.strerror}", elsewhere)
    said = f"{folder}: {usage.free / 2**30:.1f} GiB free of {usage.total / 2**30:.0f}"
    if usage.used / usage.total > FULL_SHARE:
        return Finding(name, False, f"{said}, more than {FULL_SHARE:.0%} full: Ray would place nothing here", f"free some, or {elsewhere}")
    return Finding(name, usage.free >= LEAST_FREE_BYTES, said, f"free at least {LEAST_FREE_BYTES / 2**30:.0f} GiB, or {elsewhere}")


def check_memory(available: int) -> Finding:
    said = f"{available / 2**30:.1f} GiB available"
    return Finding("memory", available >= LEAST_MEMORY_BYTES, said, "end something: a local cluster of two hosts takes about 4 GiB")


def check_shared_memory(place: Path) -> Finding:
    if not place.is_dir():
        return Finding("shared memory", True, "no /dev/shm: Ray uses files instead")
    free = shutil.disk_usage(place).free
    fix = "give the container more, such as docker run --shm-size=2g"
    return Finding("shared memory", free >= LEAST_SHARED_BYTES, f"{free / 2**20:.0f} MiB free in {place}", fix)


def check_files(limits: tuple[int, int]) -> Finding:
    soft, hard = limits
    well = soft == resource.RLIM_INFINITY or soft >= LEAST_FILES
    return Finding("open files", well, f"at most {soft} a process", f"ulimit -n {hard if hard >= LEAST_FILES else 65536}")


def check_addresses(address: str) -> Finding:
    """Emulated hosts have loopback addresses of their own."""
    try:
        with socket.socket() as place:
            place.bind((address, 0))
    except OSError as error:
        return Finding("loopback", False, f"{address}: {error.strerror}", "the local cluster needs Linux; clusters on Google Cloud do not")
    return Finding("loopback", True, "every 127.* address can be listened on")


def check_clock(url: str, skew: Callable[[str], float]) -> Finding:
    try:
        seconds = skew(url)
    except OSError as error:
        return Finding("clock", False, f"{url} does not answer: {error}", "check the network, and the proxy settings")
    said = f"{seconds:+.0f} s from the service's"
    return Finding("clock", abs(seconds) <= MOST_CLOCK_S, said, "let NTP set the clock: timedatectl set-ntp true")


def _skew(url: str) -> float:
    """Seconds that this machine is ahead of a server. Raises OSError."""
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as error:  # any answer carries the time
        date = error.headers["Date"]
        error.close()
    return time.time() - parsedate_to_datetime(date).timestamp()


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _slices(config: ClusterConfig) -> str:
    api = TpuApi(config.endpoint, config.effective_project, patience=PATIENCE_S)
    try:
        found = {zone: len(api.list_nodes(zone)) for zone in config.effective_zones}
    finally:
        api.close()
    return f"project {config.effective_project}: " + ", ".join(f"{count} TPU VMs in {zone}" for zone, count in found.items())


def _asked(name: str, ask: Callable[[], str]) -> Finding:
    """Errors of the services say themselves what to do."""
    try:
        return Finding(name, True, ask())
    except PodlaunchError as error:
        said, _, fix = str(error).partition("; ")
        return Finding(name, False, said, fix)
