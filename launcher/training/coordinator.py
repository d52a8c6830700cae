"""Waiting for the process that the others of a run meet at.

Whoever asks JAX's coordinator before it serves waits for a second or so: that is gRPC's pause after a first try in vain (measured with JAX
0.10.2: 0.8 to 1.05 s whether process 0 was 0.05 or 0.5 s later, and nothing on top of its delay when its port was looked at first).
"""

import socket
import time
from collections.abc import Callable

LOOK_S = 0.01
LIMIT_S = 60.0
"""After that JAX may say what is wrong."""


def await_coordinator(address: str, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Returns when somebody serves at `address`, host:port, or after LIMIT_S; whether somebody does."""
    host, _, port = address.rpartition(":")
    deadline = clock() + LIMIT_S
    while clock() < deadline:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
        except OSError:
            sleep(LOOK_S)  # another host's process, which tells nobody
        else:
            return True
    return False
