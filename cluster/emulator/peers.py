"""Who speaks to the emulated service: its port is on loopback, where every user of the machine can reach it.

A node's startup script runs as the user who started the service, so other users must not create nodes. The kernel's table of
connections tells whose socket the other end is; nothing has to be configured in the client for that.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))  # gRPC's client uses IPv6 sockets for IPv4 addresses as well
_TRUST_SECONDS = 30.0
"""A port may go to another user when its connection ends, but hardly within this."""


class Peers:
    """Tells own connections from those of other users. Safe to use from several threads."""

    def __init__(self, port: int, *, tables: Iterable[Path] = _TABLES, clock: Callable[[], float] = time.monotonic) -> None:
        """`port`: the one that the service listens on."""
        self._port, self._tables, self._clock = port, tuple(tables), clock
        self._allowed = {os.getuid(), 0}
        self._trusted: dict[str, float] = {}
        self._lock = threading.Lock()

    def allowed(self, peer: str) -> bool:
        """Whether `peer` (as gRPC names it: ipv4:127.0.0.1:PORT) belongs to this user or to root.

        One that the tables do not show is let in: that happens only where there are no such tables.
        """
        now = self._clock()
        with self._lock:
            if self._trusted.get(peer, float("-inf")) > now:
                return True
        user = self._user_of(int(peer.rpartition(":")[2]))
        if user is not None and user not in self._allowed:
            return False
        with self._lock:
            self._trusted = {known: until for known, until in self._trusted.items() if until > now}
            self._trusted[peer] = now + _TRUST_SECONDS
        return True

    def _user_of(self, port: int) -> int | None:
        for table in self._tables:
            if not table.exists():
                continue
            for line in table.read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                # local_address and rem_address are HEX_IP:HEX_PORT; the eighth column is the socket's user.
                local, remote = (int(address.rpartition(":")[2], 16) for address in fields[1:3])
                if (local, remote) == (port, self._port):
                    return int(fields[7])
        return None
