"""Ports that are free now."""

import contextlib
import socket


def free_ports(ip: str, count: int) -> list[int]:
    """So many different ones of that address; of all addresses of the machine when it is empty."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind((ip, 0))
        return [int(listener.getsockname()[1]) for listener in sockets]


def free_port(ip: str, wanted: int = 0) -> int:
    """`wanted` where it is free on every address of the machine (Ray's GCS listens on all of them), else any."""
    if wanted:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", wanted))
            return wanted
    return free_ports(ip, 1)[0]
