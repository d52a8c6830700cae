"""Whose connections the emulated service answers."""

import os
import socket
from pathlib import Path

from cluster.emulator.peers import Peers

HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
LINE = "   1: 0100007F:{local:04X} 0100007F:{remote:04X} 01 00000000:00000000 00:00000000 00000000 {uid:5d}        0 1\n"


def table(tmp_path: Path, uid: int) -> Path:
    path = tmp_path / "tcp"
    # The service's own end of the connection comes first and must not be taken for the other one.
    path.write_text(HEADER + LINE.format(local=50000, remote=40000, uid=os.getuid()) + LINE.format(local=40000, remote=50000, uid=uid))
    return path


def test_own_user_and_root_are_allowed_and_others_are_not(tmp_path: Path) -> None:
    assert Peers(50000, tables=[table(tmp_path, os.getuid())]).allowed("ipv4:127.0.0.1:40000")
    assert Peers(50000, tables=[table(tmp_path, 0)]).allowed("ipv4:127.0.0.1:40000")
    assert not Peers(50000, tables=[table(tmp_path, 54321)]).allowed("ipv4:127.0.0.1:40000")


def test_trust_in_a_connection_ends(tmp_path: Path) -> None:
    now = 0.0
    path = table(tmp_path, os.getuid())
    peers = Peers(50000, tables=[path], clock=lambda: now)
    assert peers.allowed("ipv4:127.0.0.1:40000")
    table(tmp_path, 54321)
    assert peers.allowed("ipv4:127.0.0.1:40000")
    now = 31.0
    assert not peers.allowed("ipv4:127.0.0.1:40000")


def test_kernel_tables_show_the_user_of_a_real_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        peers = Peers(server.getsockname()[1])
        assert peers._user_of(client.getsockname()[1]) == os.getuid()
