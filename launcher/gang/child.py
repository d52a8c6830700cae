"""One training process of a host, as its runner sees it: what it says, what it is asked, how it ended.

It is started by a thread that lives as long as it does: the kernel sends its PR_SET_PDEATHSIG when the THREAD that started it ends, not
the process.
"""

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import PodlaunchError
from launcher.gang.attempt import EXIT_STOPPED
from launcher.gang.evidence import first_error, sickness
from launcher.gang.memory import OomWatch
from launcher.gang.mirror import Place
from launcher.gang.nursery import Borrowed
from launcher.gang.pipes import Pipes, start

Event = dict[str, Any]

LAST_WORDS_S = 10.0
"""How long the end of a process that failed may be kept from the supervisor until the last of its log is sent."""
_TAIL_BYTES = 64 * 1024


class Child:
    """One training process and what it says. Puts events into `events`; the last one is `exit` with the process's return code."""

    def __init__(
        self,
        argv: list[str],
        env: Mapping[str, str],
        log: Path | None,
        events: "queue.Queue[Event]",
        place: Place | None = None,
        borrowed: tuple[Borrowed, Pipes] | None = None,
    ) -> None:
        """`log`: None for a spare, which says nothing before its orders (launcher/training/spare.py). `place`: what is to be sent from
        while the process lives, and after it. `borrowed`: a spare of the host's nursery, instead of one that `argv` starts in `env`.
        """
        self._borrowed = borrowed
        self._events = events
        self._orders: int | None = None
        """Where a spare's orders are written, once."""
        self._sender: threading.Thread | None = None
        self._place = place
        self._ended, self._told = threading.Event(), threading.Event()
        self._argv = argv
        self._env = dict(env)
        self._log = log
        self._started = threading.Event()
        self._process: subprocess.Popen[bytes] | Borrowed | None = None
        self._error: OSError | None = None
        self._asked = False
        self._stop: int | None = None
        """What is written here the process can read; None when it is gone."""
        self._requests: int | None = None
        """The same of requests for profiles."""
        self._lock = threading.Lock()
        self._done = False
        """It has said that nothing is left to do."""
        threading.Thread(target=self._live, name="child", daemon=True).start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    def order(self, arguments: list[str], environment: Mapping[str, str], log: Path, events: "queue.Queue[Event]") -> bool:
        """Make the training process out of a spare. False when it is gone."""
        log.parent.mkdir(parents=True, exist_ok=True)
        given = dict(environment) if self._borrowed is None else {**self._env, **environment}  # which the nursery could not know
        orders = json.dumps({"arguments": arguments, "environment": given, "log": str(log)}) + "\n"
        with self._lock:
            if self._orders is None:
                return False
            pipe, self._orders = self._orders, None
            self._log, self._events = log, events
            try:
                with os.fdopen(pipe, "w", encoding="utf-8") as writing:
                    writing.write(orders)
            except BrokenPipeError:
                self._log = None
                return False
            self._start_sending()
            return True

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def ask_to_end(self) -> None:
        """At its next step, with its state saved."""
        with self._lock:
            if self._stop is not None and not self._asked:
                self._asked = True
                os.write(self._stop, b".")
        self.signal(signal.SIGTERM)

    def request(self, line: str) -> None:
        """Something to be done between two steps; nothing when the process is gone."""
        with self._lock:
            if self._requests is not None:
                os.write(self._requests, f"{line}\n".encode())

    def wait(self, timeout: float) -> bool:
        """Whether the process ended within `timeout` seconds, and what it left is sent or given up."""
        return self._told.wait(timeout)

    def _begin(self) -> Pipes:
        """Start the process, or take the borrowed one. Raises OSError."""
        if self._borrowed is not None:
            self._process, pipes = self._borrowed
        else:
            output = self._open_log()
            try:
                self._process, pipes = start(self._argv, self._env, output, spare=self._log is None)
            finally:
                os.close(output)
        self._stop, self._requests, self._orders = pipes.stop, pipes.requests, pipes.orders
        return pipes

    def _live(self) -> None:
        try:
            pipes = self._begin()
        except OSError as error:
            self._error = error
            return
        finally:
            self._started.set()
        assert self._process is not None
        memory = OomWatch(self._process.pid)
        if self._log is not None:
            self._start_sending()
        with os.fdopen(pipes.events, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                event = _parse(line)
                self._done = self._done or _says_done(event)
                self._events.put(event)
        code = self._process.wait()
        with self._lock:
            os.close(pipes.stop)
            os.close(pipes.requests)
            self._stop = self._requests = None
            if self._orders is not None:
                os.close(self._orders)
                self._orders = None
        for end in pipes.held:
            os.close(end)
        if code == 0 and self._asked and not self._done:
            code = EXIT_STOPPED
        self._ended.set()
        if self._log is None:  # a spare that never had orders
            self._told.set()
            return
        if self._sender is not None:
            self._sender.join(None if code == 0 else LAST_WORDS_S)
        said = _tail(self._log)
        self._events.put(
            {
                "event": "exit",
                "code": code,
                "time": time.time(),
                "last_line": first_error(said),
                "sick": sickness(said) if code != 0 else "",
                "oom": memory.evidence() if code == -signal.SIGKILL else "",
            }
        )
        self._told.set()

    def _open_log(self) -> int:
        if self._log is None:
            return os.open(os.devnull, os.O_WRONLY)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        return os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _start_sending(self) -> None:
        self._sender = threading.Thread(target=self._send, name="send", daemon=True)
        self._sender.start()

    def _send(self) -> None:
        if self._place is None:
            return
        self._place.keep_sending(self._ended)
        try:
            self._place.finish()
        except PodlaunchError as error:
            self._events.put({"event": "unsent", "error": str(error)})


def _parse(line: str) -> Event:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return {"event": "noise", "text": line.rstrip()}  # a user's program may write to the descriptor too
    return value if isinstance(value, dict) else {"event": "noise", "text": line.rstrip()}


def _says_done(event: Event) -> bool:
    return event.get("event") == "finished" or (event.get("event") == "step" and event.get("step") == event.get("total_steps"))


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace")
