"""Keeps one `ray start --block` alive on a machine; the head's agent and every host's agent have one."""

import logging
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

logger = logging.getLogger(__name__)


def restart_delays(first: float = 1.0, factor: float = 2.0, longest: float = 30.0) -> Iterator[float]:
    """Seconds to wait before each further start of Ray on this machine."""
    delay = first
    while True:
        yield delay
        delay = min(delay * factor, longest)


class RayProcess:
    """Starts Ray, starts it again when it dies, ends it on request.

    `start` starts the process; `wait` waits for so many seconds or until the end is asked for, and says which (True: end).
    """

    def __init__(self, start: Callable[[], "subprocess.Popen[bytes]"], wait: Callable[[float], bool]) -> None:
        self._start = start
        self._wait = wait
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, delays: Iterator[float]) -> None:
        """Returns once the end was asked for and the process is gone."""
        while True:
            self._process = self._start()
            code = self._process.wait()
            delay = next(delays)
            logger.warning("ray ended with code %d; starting it again in %.0f s unless the end was asked for", code, delay)
            if self._wait(delay):
                return

    def end(self) -> None:
        """SIGTERM lets Ray drain the node before it goes."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)


class RayKeeper:
    """Keeps one `ray start --block` alive until SIGTERM or `end`."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._command, self._env = command, dict(env)
        self._ending = threading.Event()
        self._ray = RayProcess(self._start, lambda seconds: self._ending.wait(seconds))

    def run(self) -> None:
        """Returns once the end was asked for and Ray is gone. To be called from the main thread."""
        signal.signal(signal.SIGTERM, lambda *_: self.end())
        self._ray.run(restart_delays())

    def end(self) -> None:
        """Ask for the end, from any thread."""
        self._ending.set()
        self._ray.end()

    def _start(self) -> "subprocess.Popen[bytes]":
        logger.info("starting %s", " ".join(self._command))
        return subprocess.Popen(self._command, env=self._env, stdin=subprocess.DEVNULL)


def run_until_sigterm(command: Sequence[str], env: Mapping[str, str]) -> None:
    """Keep `command` alive until this process gets SIGTERM."""
    RayKeeper(command, env).run()
