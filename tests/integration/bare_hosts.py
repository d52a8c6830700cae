"""A cluster on a bare image where nothing outside the machine can be reached. Run in a network namespace of its own:

    unshare --net python -m tests.integration.bare_hosts CONFIG NAMESPACE

CONFIG: a ClusterConfig as JSON, whose bundle its bucket holds. NAMESPACE: the network namespace of the caller. Prints what was found as
JSON.
"""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from cluster import clusters, local
from cluster.clusters import Cluster
from cluster.config import ClusterConfig
from cluster.errors import ClusterError
from cluster.ray_http import RayNode
from cluster.state import emulator_dir
from tests.integration.conftest import eventually

SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1
OUTSIDE = (("8.8.8.8", 53), ("1.1.1.1", 443))
JOIN_LIMIT_S = 180.0
REPORT = """
import importlib.metadata as m, json, sys
print(json.dumps({"prefix": sys.prefix, "versions": {d.metadata["Name"]: d.version for d in m.distributions()}}))
"""


def main() -> None:
    config, namespace = ClusterConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2]
    assert own_namespace() != namespace
    loopback_up()
    found: dict[str, Any] = {"outside": [connect(place) for place in OUTSIDE]}
    said: list[str] = []
    try:
        local.ensure_emulator("")
        started = time.monotonic()
        cluster = clusters.up(config, said.append)
        found |= watch_boots(cluster, started)
        clusters.stop(cluster, said.append)
    finally:
        local.stop_emulator()
    print(json.dumps({**found, "progress": said}))


def watch_boots(cluster: Cluster, started: float) -> dict[str, Any]:
    """The first boot, which installs, and the second, which does not."""
    node = wait_for_host(cluster, previous="")
    joined = time.monotonic() - started
    (disk,) = (emulator_dir() / "hosts").iterdir()
    home = disk / "opt" / "podlaunch"
    python = str(home / "bin" / "python")
    report = json.loads(subprocess.run([python, "-c", REPORT], capture_output=True, check=True, timeout=60).stdout)
    consistent = subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True, timeout=120, check=False)
    running = agents(disk)
    before = [describe(process) for process in running]
    reboot(running)
    restarted = time.monotonic()
    again = wait_for_host(cluster, previous=node.node_id)
    return {
        "seconds_to_join": joined,
        "seconds_to_join_again": time.monotonic() - restarted,
        "joined_anew": again.node_id != node.node_id,
        "home": str(home),
        "left_in_home": sorted(path.name for path in home.iterdir()),
        "serial_log": (disk / "serial.log").read_text(),
        "pip_check": consistent.stdout,
        "agents": [*before, *(describe(process) for process in agents(disk))],
        **report,
    }


def own_namespace(pid: int | str = "self") -> str:
    return str(Path(f"/proc/{pid}/ns/net").readlink())


def loopback_up() -> None:
    """As `ip link set lo up` does."""
    with socket.socket() as channel:
        flags = struct.unpack_from("16sh", fcntl.ioctl(channel, SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0)))[1]
        fcntl.ioctl(channel, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def connect(place: tuple[str, int]) -> str:
    """The name of the error with which a connection fails; empty when it does not."""
    try:
        socket.create_connection(place, timeout=5).close()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return ""


def wait_for_host(cluster: Cluster, previous: str) -> RayNode:
    """The one host of the slice, once Ray has it; `previous`: the id that it had before."""
    found: list[RayNode] = []

    def joined() -> bool:
        try:
            found[:] = [node for node in cluster.http.nodes() if node.alive and node.slice_name and node.node_id != previous]
        except ClusterError:
            return False
        return bool(found)

    eventually(joined, "the host joins Ray", JOIN_LIMIT_S)
    return found[0]


def agents(disk: Path) -> list[psutil.Process]:
    """The host's agent and its raylet."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("HOME") == str(disk / "home")
            if ours and re.search(r"cluster\.vm\.host_agent|raylet/raylet", " ".join(process.cmdline())):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def describe(process: psutil.Process) -> dict[str, Any]:
    return {"command": process.cmdline(), "namespace": own_namespace(process.pid)}


def reboot(running: list[psutil.Process]) -> None:
    (node,) = local.ask_emulator("GET", "/nodes")
    host = {"node": node["name"], "worker": 0}
    local.ask_emulator("POST", "/host", {**host, "action": "kill"})
    _, left = psutil.wait_procs(running, timeout=20)
    assert not left
    eventually(lambda: bool(local.ask_emulator("GET", "/nodes")[0]["hosts"][0]["exited"]), "the host is seen to have died", 20)
    local.ask_emulator("POST", "/host", {**host, "action": "boot"})


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.chdir("/")
    main()
