"""The nursery of a host: between runs it keeps one process warm, which has imported what training needs, for the next runner to borrow.

Started by the host's agent as soon as a run has asked for it (cluster/vm/host_dir.py): `python -m launcher.gang.nursery`. A runner connects
to its socket and gets the pipes of the warm process (launcher/training/warm.py); the connection stays open for as long as the runner lives:

    nursery -> runner      {"pid": ...} with the ends of the pipes, or {"pid": null} when none is warm; later {"code": ...}, when it ended
    runner -> nursery      nothing; when the connection closes the process is killed, so that it dies with its runner as a child would

While a runner is connected no other process is warmed: the host's memory and processors are its own.
"""

import argparse
import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.logs import set_up_logging
from cluster.vm.host_dir import HOST_DIR_VARIABLE
from launcher.gang.pipes import Pipes, start

logger = logging.getLogger(__name__)

COMMAND = ("-m", "launcher.gang.nursery")
"""Arguments of Python."""
WARM_AFTER_S = 10.0
"""How long nobody has used the host before a process is warmed: the next run is often there at once."""
AGAIN_AFTER_S = 300.0
"""After a warm process that ended by itself."""
_ENDS = 6
"""File descriptors, at most, that come with an answer."""
_LIMIT_S = 10.0
"""For a runner to take its answer, and for the nursery to give it."""
_SOCKET = "nursery.sock"


@dataclass(eq=False)
class Warm:
    """A process, and the runner's ends of its pipes until they are lent."""

    process: subprocess.Popen[bytes]
    pipes: Pipes | None

    @classmethod
    def start(cls, arguments: Sequence[str]) -> "Warm":
        """Called in the main thread: the kernel ends the process when the thread that started it ends."""
        output = os.open(os.devnull, os.O_WRONLY)
        try:
            return cls(*start([sys.executable, *arguments], {**os.environ, "PYTHONSAFEPATH": "1"}, output, spare=True))
        finally:
            os.close(output)

    def close(self) -> None:
        if self.pipes is not None:
            self.pipes.close()
            self.pipes = None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.close()


@dataclass(eq=False)
class _Loan:
    """A runner that is connected, and what it has borrowed."""

    connection: socket.socket
    warm: Warm | None = field(default=None)


class Nursery:
    """One thread, one loop."""

    def __init__(
        self, listener: socket.socket, make: Callable[[], Warm], clock: Callable[[], float] = time.monotonic, after: float = WARM_AFTER_S
    ) -> None:
        """`make` starts a process to be warmed. `clock`: monotonic seconds. `after`: seconds, as WARM_AFTER_S."""
        self._listener, self._make, self._clock, self._after = listener, make, clock, after
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._lend)
        self._loans: list[_Loan] = []
        self._warm: Warm | None = None
        self._handles: dict[Warm, int] = {}
        """File descriptors that become readable when a process ends."""
        self._due = clock() + after

    @property
    def pid(self) -> int | None:
        """Of the process that is warm."""
        return None if self._warm is None else self._warm.process.pid

    def turn(self) -> None:
        """Wait for the next thing to do, and do it."""
        idle = self._warm is None and not self._loans
        for key, _ in self._selector.select(max(0.0, self._due - self._clock()) if idle else None):
            key.data()
        if self._warm is None and not self._loans and self._clock() >= self._due:
            self._warm = self._make()
            self._watch(self._warm, self._cooled)

    def end(self) -> None:
        """Nothing is left of it."""
        for warm in [self._warm, *(loan.warm for loan in self._loans)]:
            if warm is not None:
                self._forget(warm)
                warm.kill()
        for loan in self._loans:
            loan.connection.close()
        self._listener.close()
        self._selector.close()

    def _lend(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(_LIMIT_S)
        warm, self._warm = self._warm, None
        if warm is not None:
            self._forget(warm)
        loan = _Loan(connection, warm)
        self._loans.append(loan)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._give_back(loan))
        pid, pipes = (None, None) if warm is None else (warm.process.pid, warm.pipes)
        try:
            socket.send_fds(connection, [json.dumps({"pid": pid}).encode() + b"\n"], [] if pipes is None else pipes.all)
        except OSError as error:
            logger.warning("a runner did not take its process: %s", error)
            self._give_back(loan)
            return
        if warm is not None:
            warm.close()
            self._watch(warm, lambda: self._tell(loan))

    def _tell(self, loan: _Loan) -> None:
        """What was lent has ended; its runner learns how, and goes on to hold the host."""
        assert loan.warm is not None
        warm, loan.warm = loan.warm, None
        self._forget(warm)
        with contextlib.suppress(OSError):  # the runner is gone as well
            loan.connection.sendall(json.dumps({"code": warm.process.wait()}).encode() + b"\n")

    def _give_back(self, loan: _Loan) -> None:
        self._selector.unregister(loan.connection)
        loan.connection.close()
        self._loans.remove(loan)
        if loan.warm is not None:
            self._forget(loan.warm)
            loan.warm.kill()
        self._due = self._clock() + self._after

    def _cooled(self) -> None:
        assert self._warm is not None
        warm, self._warm = self._warm, None
        self._forget(warm)
        logger.warning("the warm process ended with %d", warm.process.wait())
        warm.close()
        self._due = self._clock() + AGAIN_AFTER_S

    def _watch(self, warm: Warm, ended: Callable[[], None]) -> None:
        self._handles[warm] = os.pidfd_open(warm.process.pid)
        self._selector.register(self._handles[warm], selectors.EVENT_READ, ended)

    def _forget(self, warm: Warm) -> None:
        handle = self._handles.pop(warm, None)
        if handle is not None:
            self._selector.unregister(handle)
            os.close(handle)


class Borrowed:
    """A process of the nursery's, with what subprocess.Popen offers of one."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        """Raises ProcessLookupError when it has ended already."""
        self._connection, self.pid = connection, pid
        self._handle = os.pidfd_open(pid)
        self._code: int | None = None

    def poll(self) -> int | None:
        """None until `wait` has returned."""
        return self._code

    def wait(self) -> int:
        """Its exit code. A nursery that is gone has taken it along."""
        if self._code is None:
            with self._connection.makefile("rb") as lines:
                line = lines.readline()
            self._code = int(json.loads(line)["code"]) if line else -signal.SIGKILL
        return self._code

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, number)


@dataclass(frozen=True)
class Borrowing:
    """What a runner has of the nursery."""

    connection: socket.socket
    """Stays open while the runner lives."""
    lent: tuple[Borrowed, Pipes] | None = None


def borrow(folder: Path) -> Borrowing | None:
    """Connect to the nursery of the host with this folder, and borrow its warm process if it has one. None when no nursery answers."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        with _short(folder) as place:
            connection.connect(str(place / _SOCKET))
        connection.settimeout(_LIMIT_S)
        said, ends, _, _ = socket.recv_fds(connection, 4096, _ENDS)
        pid = json.loads(said)["pid"]
        connection.settimeout(None)
        return Borrowing(connection, None if pid is None else (Borrowed(connection, pid), Pipes.of(ends)))
    except (OSError, ValueError) as error:
        connection.close()
        logger.info("nothing to borrow: %s", error)
        return None


def listen(folder: Path) -> socket.socket:
    """In the place of the nursery before, if there was one."""
    listener = socket.socket(socket.AF_UNIX)
    with _short(folder) as place:
        (place / _SOCKET).unlink(missing_ok=True)
        listener.bind(str(place / _SOCKET))
    listener.listen()
    return listener


@contextlib.contextmanager
def _short(folder: Path) -> Iterator[Path]:
    """Another name of the folder: the path of a socket is limited to 107 bytes."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield Path(f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launcher.gang.nursery")
    parser.parse_args()
    set_up_logging("nursery", terminal=None)
    nursery = Nursery(listen(Path(os.environ[HOST_DIR_VARIABLE])), lambda: Warm.start(["-m", "launcher.training.warm"]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while True:
            nursery.turn()
    finally:
        nursery.end()


if __name__ == "__main__":
    main()
