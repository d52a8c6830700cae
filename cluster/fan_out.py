"""Programs for several hosts at once: their output line by line as it comes, their exit codes, and all of them ended together."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import IO

from cluster.remote import HostProgram

Write = Callable[[int, bool, bytes], None]
"""Takes the host, whether it is its standard error, and one whole line; called for one line at a time."""
_PATIENCE_S = 8.0
"""For a command to end on its host: supervised ones are killed there after 5 s."""


def run_all(programs: Mapping[int, HostProgram], write: Write, *, patience: float = _PATIENCE_S) -> dict[int, int]:
    """Run all at the same time, one for each host. Returns the exit codes; 128 + N for one that signal N has ended.

    An interrupt ends all of them: their standard inputs end, and what has not ended after `patience` seconds is killed.
    """
    running: dict[int, subprocess.Popen[bytes]] = {}
    lock = threading.Lock()
    try:
        for host, program in programs.items():
            running[host] = _start(program)
        # Daemons: what a command has left running on its host may hold its output open for ever.
        readers = [
            threading.Thread(target=_pass_on, args=(process, stream, host, is_error, write, lock), daemon=True)
            for host, process in running.items()
            for stream, is_error in ((process.stdout, False), (process.stderr, True))
        ]
        for reader in readers:
            reader.start()
        codes = {host: process.wait() for host, process in running.items()}
        for reader in readers:
            reader.join()
    finally:
        _end(running.values(), patience)
    return {host: code if code >= 0 else 128 - code for host, code in codes.items()}


def _start(program: HostProgram) -> "subprocess.Popen[bytes]":
    pipe = subprocess.PIPE
    # Of a session of its own, so that Ctrl-C reaches us alone.
    return subprocess.Popen(
        program.argv, env=program.env, cwd=program.cwd, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True
    )


def _pass_on(process: "subprocess.Popen[bytes]", stream: IO[bytes], host: int, is_error: bool, write: Write, lock: threading.Lock) -> None:
    wanted = True
    with os.fdopen(os.dup(stream.fileno()), "rb") as lines:
        for line in lines:
            try:
                with lock:
                    if wanted:
                        write(host, is_error, line if line.endswith(b"\n") else line + b"\n")
            except OSError:  # nobody reads us any more: end it, and let it say its last words
                wanted = False
                _close_input(process)


def _end(running: Iterable["subprocess.Popen[bytes]"], patience: float) -> None:
    deadline = time.monotonic() + patience
    for process in running:
        _close_input(process)
    try:
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:  # also when somebody is more impatient than that
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


def _close_input(process: "subprocess.Popen[bytes]") -> None:
    if process.stdin is not None:
        process.stdin.close()
