"""`tpu stop -y` leaves no process, no open port and no node behind; a head whose agent died is taken over by the next start."""

import json
import os
import signal
import socket
from pathlib import Path

import psutil
import pytest

from cluster.state import short_dir
from tests.integration.conftest import Home

pytestmark = pytest.mark.timeout(300)


def slices_ready(home: Home) -> bool:
    rows = json.loads(home.tpu("status", "--json").stdout)
    return bool(rows and rows[0]["slices"] and rows[0]["slices"][0]["hosts_ready"] == 2)


def open_ports(home: Home) -> set[tuple[str, int]]:
    found = set()
    for process in home.processes():
        try:
            found |= {(c.laddr.ip, c.laddr.port) for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_stop_leaves_nothing_behind(alone: Home) -> None:
    started = alone.tpu("start", "--slices", "1", limit=240)
    assert started.returncode == 0, started.stderr
    assert "2 of 2 hosts" in started.stderr
    assert slices_ready(alone), "it has waited for them"
    ports = open_ports(alone)
    assert len(ports) > 10, "the cluster listens"
    refused = alone.tpu("stop")
    assert refused.returncode == 2, "nobody can be asked, so nothing is stopped"
    assert "-y" in refused.stderr

    stopped = alone.tpu("stop", "-y")
    assert stopped.returncode == 0, stopped.stderr
    assert alone.processes() == []
    assert open_ports(alone) == set()
    for ip, port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1" if ip in ("0.0.0.0", "::") else ip, port)) != 0, f"{ip}:{port} is open"
    assert "no cluster is up" in alone.tpu("status").stdout
    assert list((alone.state / "emulator").glob("hosts/*")) == [], "no node is left"
    assert "no cluster is up" in alone.tpu("stop", "-y").stdout


def test_a_head_whose_agent_was_killed_is_taken_over_by_the_next_start(alone: Home) -> None:
    assert alone.tpu("start", "--slices", "1", limit=240).returncode == 0
    before = json.loads(alone.tpu("status", "--json").stdout)[0]
    record = json.loads((alone.state / "clusters" / "local" / "process.json").read_text())
    rays = {process for process in alone.processes() if "gcs_server" in process.name() or "raylet" in process.name()}
    assert len(rays) == 4, "the head's two, and a raylet a host"
    os.kill(record["pid"], signal.SIGKILL)
    assert json.loads(alone.tpu("status", "--json").stdout)[0]["head"] == "DOWN"
    again = alone.tpu("start")
    assert again.returncode == 0, again.stderr
    assert "starting it again for the slices that are there" in again.stderr
    assert all(process.is_running() for process in rays), "nothing was started twice, and nothing ended"
    after = json.loads(alone.tpu("status", "--json").stdout)[0]
    assert (after["head"], after["dashboard"]) == ("UP", before["dashboard"])
    assert [(one["name"], one["hosts_ready"]) for one in after["slices"]] == [(before["slices"][0]["name"], 2)]


def test_sockets_of_ray_lie_in_a_short_private_folder(tmp_path: Path) -> None:
    folder = short_dir(tmp_path)
    assert len(str(folder)) < 40
    assert folder.stat().st_mode & 0o077 == 0
