"""The way to a head VM that has no address on the internet: `gcloud compute ssh` through Google's Identity-Aware Proxy.

One tunnel a cluster, a background process that later commands reuse; it is started again when it died and ended by `tpu stop`.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster import processes
from cluster.errors import ClusterError
from cluster.processes import ProcessRecord
from cluster.state import read_json, write_atomic

LIMIT_S = 60.0
"""gcloud takes 5 to 10 s to log in through IAP; the first time it makes an SSH key and sends it to the VM's metadata besides."""


class TunnelError(ClusterError):
    """No tunnel. `passing`: the same try may succeed when the VM has booted."""

    def __init__(self, text: str, *, passing: bool = False) -> None:
        super().__init__(text)
        self.passing = passing


@dataclass(frozen=True)
class Trouble:
    """What gcloud says, what it means, what to do next."""

    pattern: re.Pattern[str]
    meaning: str
    next_step: str
    passing: bool = False


# The codes are those of IAP's relay (https://cloud.google.com/iap/docs/faq#error-codes). The first that fits counts.
TROUBLES = (
    Trouble(
        re.compile(r"(?i)no(t currently have an)? active account|gcloud auth login|reauth|invalid_grant|credentials .*(expired|revoked)"),
        "gcloud is not logged in",
        "run: gcloud auth login",
    ),
    Trouble(
        re.compile(r"(?i)4033|iap\.tunnelInstances|not authorized"),
        "this account may not open IAP tunnels",
        "grant it roles/iap.tunnelResourceAccessor, or set cluster.head_access=direct inside the VPC",
    ),
    Trouble(
        re.compile(r"(?i)required '[^']*' permission|PERMISSION_DENIED|does not have permission"),
        "this account may not use the VM",
        "grant it roles/compute.instanceAdmin.v1 (or roles/compute.osLogin where OS Login is on)",
    ),
    Trouble(
        re.compile(r"(?i)4003|failed to connect to backend|connection refused|timed out"),
        "the VM does not answer on port 22",
        "wait for its boot to end, and allow tcp:22 from 35.235.240.0/20 in the network's firewall",
        passing=True,
    ),
    Trouble(
        re.compile(r"(?i)4010|4047|failed to lookup instance|is not running|not ready"),
        "the VM is not running yet",
        "wait a minute and try again; `tpu start` makes it anew when it is gone",
        passing=True,
    ),
    Trouble(
        re.compile(r"(?i)permission denied \(publickey|host key verification failed|remote side unexpectedly closed"),
        "the VM does not take this SSH key",
        "wait a minute for the key to reach it, or run once: gcloud compute ssh with the same VM",
        passing=True,
    ),
    Trouble(re.compile(r"(?i)was not found|could not fetch resource"), "there is no such VM", "make it again with `tpu start`"),
)


@dataclass(frozen=True)
class Tunnel:
    """From a free port of this machine's loopback to a port of the VM's. `folder` keeps what is known of it."""

    folder: Path
    instance: str
    zone: str
    project: str
    remote_port: int

    @property
    def marker(self) -> str:
        """By what its processes are known, also when nobody could write them down."""
        return f"tunnel-{self.instance}-{hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]}"

    def command(self, gcloud: str, port: int) -> list[str]:
        head = [gcloud, "compute", "ssh", self.instance, "--zone", self.zone, "--project", self.project, "--tunnel-through-iap", "--quiet"]
        # Without its own address it would listen where the user's ssh_config says (GatewayPorts). Without the options ssh goes on when it
        # cannot listen, and a connection that the network forgot lives for hours.
        return [*head, "--", "-N", "-L", f"127.0.0.1:{port}:127.0.0.1:{self.remote_port}", *_SSH_OPTIONS]

    def open(
        self,
        *,
        env: Mapping[str, str] = os.environ,
        limit: float = LIMIT_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> int:
        """The local port of the tunnel, opened when it is not. Raises TunnelError."""
        with self._exclusive():
            port, process = self._known()
            if process is not None and process.alive() and accepts(port):
                return port
            self._end(process)
            gcloud = shutil.which("gcloud", path=env.get("PATH"))
            if gcloud is None:
                words = "gcloud is not installed; install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install)"
                raise TunnelError(f"no tunnel to {self.instance}: {words}, or set cluster.head_access=direct inside the VPC")
            port = _free_port(self._usual_port)
            self._log.unlink(missing_ok=True)  # the words must be of this try
            process = processes.spawn(self.command(gcloud, port), marker=self.marker, env=env, log=self._log, cwd=self.folder)
            write_atomic(self._record, json.dumps({"port": port, "process": vars(process)}))
            self._wait(port, process, clock() + limit, clock, sleep)
            return port

    def close(self) -> None:
        """End it, whether or not it runs."""
        with self._exclusive():
            self._end(self._known()[1])
            self._record.unlink(missing_ok=True)

    def _wait(self, port: int, process: ProcessRecord, deadline: float, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
        while not accepts(port):
            processes.reap(process)
            if not process.alive():
                raise self._trouble()
            if clock() > deadline:
                self._end(process)
                raise TunnelError(f"no tunnel to {self.instance}: gcloud did not connect in time; see {self._log}", passing=True)
            sleep(0.1)  # ssh tells nobody when it listens

    def _trouble(self) -> TunnelError:
        said = self._log.read_text(encoding="utf-8", errors="replace")
        for one in TROUBLES:
            if one.pattern.search(said):
                return TunnelError(f"no tunnel to {self.instance} in {self.zone}: {one.meaning}; {one.next_step}", passing=one.passing)
        last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "it said nothing")
        return TunnelError(f"no tunnel to {self.instance} in {self.zone}: gcloud ended: {last[:300]}; see {self._log}")

    def _known(self) -> tuple[int, ProcessRecord | None]:
        found = read_json(self._record)
        return (0, None) if found is None else (int(found["port"]), ProcessRecord.from_dict(found["process"]))

    def _end(self, process: ProcessRecord | None) -> None:
        if process is not None:
            processes.end(process, grace=2.0)
        processes.kill_members(self.marker)

    @property
    def _usual_port(self) -> int:
        """The same for a cluster every time, so that its address in the browser stays; not 8265, which a Ray of this machine would want."""
        return 18265 + int(self.marker[-4:], 16) % 10_000

    @property
    def _record(self) -> Path:
        return self.folder / "tunnel.json"

    @property
    def _log(self) -> Path:
        return self.folder / "tunnel.log"

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        handle = os.open(self.folder / ".tunnel.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


_SSH_OPTIONS = ["-o", "ExitOnForwardFailure=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"]


def accepts(port: int) -> bool:
    """Whether somebody listens on that port of the loopback."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _free_port(wanted: int) -> int:
    """`wanted` where it is free, else any."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise TunnelError("this machine has no free port on its loopback")
