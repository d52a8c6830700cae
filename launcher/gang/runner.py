"""The runner: one thin Ray actor per host. Holds the host's chips for the whole run; training runs in its child process.

A child is started by a thread that lives as long as the child: the kernel sends its PR_SET_PDEATHSIG when the THREAD that started it
ends, not the process. The child ends with its runner, and the runner with its supervisor.

A supervisor asks its runners all the time; when none has asked for a while (launcher/gang/lease.py) the child is killed: this host may be
cut off, and the run may be going on elsewhere.

When the host's agent announces the end of the host (cluster/vm/host_dir.py), the runner tells the supervisor and asks its child to
checkpoint and end at the next step: by SIGTERM, and by a byte in a pipe, which a user's program can look for at any time
(launcher/training/script.py). A process that was asked and ends with exit code 0 has stopped (143), unless it said that it was done.
"""

import contextlib
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import PodlaunchError
from cluster.secret_place import SecretPlace
from cluster.state import cache_dir
from cluster.vm.host_dir import HOST_DIR_VARIABLE, Notice, read_notice
from launcher import code
from launcher.gang.attempt import EXIT_STOPPED
from launcher.gang.evidence import first_error, sickness
from launcher.gang.lease import LEASE_S
from launcher.gang.memory import OomWatch
from launcher.gang.mirror import Place, open_place
from launcher.gang.stacks import stacks_of

logger = logging.getLogger(__name__)

Event = dict[str, Any]

NOTICE_INTERVAL_S = 0.25
"""How often the agent's file is looked at."""
LAST_WORDS_S = 10.0
"""How long the end of a process that failed may be kept from the supervisor until the last of its log is sent."""
_TAIL_BYTES = 64 * 1024

# What the child must not take over from the Ray worker that its runner is.
_NOT_FOR_CHILDREN = ("RAY_", "MEGASCALE_", "PYTHONPATH", "OMP_NUM_THREADS")


class Child:
    """One training process and what it says. Puts events into `events`; the last one is `exit` with the process's return code."""

    def __init__(
        self, argv: list[str], env: Mapping[str, str], log: Path, events: "queue.Queue[Event]", place: Place | None = None
    ) -> None:
        """`place`: what is to be sent from while the process lives, and after it."""
        self._place = place
        self._ended, self._told = threading.Event(), threading.Event()
        self._argv = argv
        self._env = dict(env)
        self._log = log
        self._events = events
        self._started = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None
        self._asked = False
        self._stop: int | None = None
        """What is written here the process can read; None when it is gone."""
        self._stop_lock = threading.Lock()
        self._done = False
        """It has said that nothing is left to do."""
        threading.Thread(target=self._live, name="child", daemon=True).start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def ask_to_end(self) -> None:
        """At its next step, with its state saved."""
        with self._stop_lock:
            if self._stop is not None and not self._asked:
                self._asked = True
                os.write(self._stop, b".")
        self.signal(signal.SIGTERM)

    def wait(self, timeout: float) -> bool:
        """Whether the process ended within `timeout` seconds, and what it left is sent or given up."""
        return self._told.wait(timeout)

    def _live(self) -> None:
        reading, writing = os.pipe()
        stop_reading, self._stop = os.pipe()
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("ab") as output:
                self._process = subprocess.Popen(
                    self._argv,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={
                        **self._env,
                        "PODLAUNCH_EVENT_FD": str(writing),
                        "PODLAUNCH_STOP_FD": str(stop_reading),
                        "PODLAUNCH_PARENT_PID": str(os.getpid()),
                    },
                    pass_fds=(writing, stop_reading),
                )
        except OSError as error:
            os.close(reading)
            os.close(stop_reading)
            os.close(self._stop)
            self._error = error
            return
        finally:
            os.close(writing)
            self._started.set()
        memory = OomWatch(self._process.pid)
        sender = threading.Thread(target=self._send, name="send", daemon=True)
        sender.start()
        with os.fdopen(reading, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                event = _parse(line)
                self._done = self._done or _says_done(event)
                self._events.put(event)
        code = self._process.wait()
        with self._stop_lock:
            os.close(self._stop)
            self._stop = None
        os.close(stop_reading)
        if code == 0 and self._asked and not self._done:
            code = EXIT_STOPPED
        self._ended.set()
        sender.join(None if code == 0 else LAST_WORDS_S)
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

    def _send(self) -> None:
        if self._place is None:
            return
        self._place.keep_sending(self._ended)
        try:
            self._place.finish()
        except PodlaunchError as error:
            self._events.put({"event": "unsent", "error": str(error)})


class Runner:
    """The actor. Its methods run in a pool of threads, so that `next_events` may block while others are called."""

    def __init__(self, run_dir: str, host: int, lease: float = LEASE_S) -> None:
        """`run_dir`: a local path or gs://. `lease`: seconds that the child lives on after the last question."""
        self._url = run_dir
        self._place = open_place(run_dir, host, cache_dir())
        self._host = host
        self._events: queue.Queue[Event] = queue.Queue()
        self._child: Child | None = None
        self._told: Notice | None = None
        self._lease = lease
        self._lock = threading.Lock()
        self._asking = 0
        """Questions that wait for an answer now."""
        self._asked = time.monotonic()
        folder = os.environ.get(HOST_DIR_VARIABLE)
        if folder is not None:
            threading.Thread(target=self._watch_notices, args=(Path(folder),), name="notices", daemon=True).start()

    def free_ports(self, count: int) -> list[int]:
        """Ports of this host that are free now."""
        sockets = [socket.socket() for _ in range(count)]
        try:
            for listener in sockets:
                listener.bind(("", 0))
            return [int(listener.getsockname()[1]) for listener in sockets]
        finally:
            for listener in sockets:
                listener.close()

    def start(self, attempt: int, environment: Mapping[str, str], log: str, secrets: str | None) -> None:
        """Start the training process of this host. Raises OSError when it cannot be started."""
        self.kill()
        unpacked = code.unpack(self._place.fetch(attempt), cache_dir() / "code")
        env = {key: value for key, value in os.environ.items() if not key.startswith(_NOT_FOR_CHILDREN)}
        env |= {
            "PYTHONPATH": str(unpacked / "podlaunch"),
            "PYTHONSAFEPATH": "1",
            "PODLAUNCH_USER_CODE": str(unpacked / "user"),
            "PODLAUNCH_COMPILATION_CACHE": str(cache_dir() / "compilation"),
            "PODLAUNCH_RUN_DIR": str(self._place.folder),
            "PODLAUNCH_ATTEMPT": str(attempt),
            "PODLAUNCH_CHECKPOINT_DIR": self._place.checkpoints,
            **_read_secrets(secrets),
            **environment,
        }
        argv = [sys.executable, "-m", "launcher.training.child", str(self._place.folder)]
        argv += ["--attempt", str(attempt), "--run", self._url, "--checkpoints", self._place.checkpoints]
        self.renew()
        self._child = Child(argv, env, self._place.folder / log, self._events, self._place)
        threading.Thread(target=self._watch_supervisor, args=(self._child,), name="lease", daemon=True).start()
        self._told = None  # this child and whoever waits for it have not heard of a notice that holds already

    def next_events(self, timeout: float) -> list[Event]:
        """What the child has said since the last call; waits up to `timeout` seconds for the first event."""
        events = self._events
        with self._asked_now():
            try:
                found = [events.get(timeout=timeout)]
            except queue.Empty:
                return []
        while not events.empty():
            found.append(events.get_nowait())
        return found

    def renew(self) -> None:
        """The supervisor lives, and asks later."""
        with self._lock:
            self._asked = time.monotonic()

    def terminate(self) -> None:
        """Ask the child to checkpoint and end."""
        if self._child is not None:
            self._child.ask_to_end()

    def stacks(self) -> str:
        """What the child is doing."""
        return "no process\n" if self._child is None else stacks_of(self._child.pid)

    def kill(self) -> None:
        """End the child now; returns when it is gone and its chips are free."""
        if self._child is not None:
            self._child.signal(signal.SIGKILL)
            self._child.wait(30.0)
            self._child = None
            self._events = queue.Queue()  # what it said is over

    @contextlib.contextmanager
    def _asked_now(self) -> Iterator[None]:
        with self._lock:
            self._asking += 1
        try:
            yield
        finally:
            with self._lock:
                self._asking -= 1
                self._asked = time.monotonic()

    def _watch_supervisor(self, child: Child) -> None:
        """For as long as the child lives."""
        while not child.wait(self._lease / 20):  # nobody tells that nobody asks
            with self._lock:
                silent = 0.0 if self._asking else time.monotonic() - self._asked
            if silent > self._lease:
                logger.warning("no supervisor has asked for %.0f s: ending the training process", silent)
                child.signal(signal.SIGKILL)
                return

    def _watch_notices(self, folder: Path) -> None:
        """For as long as the actor lives: its process ends with it."""
        while True:
            self.pass_on(read_notice(folder))
            time.sleep(NOTICE_INTERVAL_S)  # a file of another process, which tells nobody

    def pass_on(self, notice: Notice | None) -> None:
        """Tell the supervisor of a new notice, and the child to checkpoint and end while there is time."""
        if notice is None or notice == self._told or self._child is None:
            return
        self._told = notice
        self._events.put({"event": "notice", "kind": notice.kind.value, "time": notice.time, "deadline": notice.deadline})
        self.terminate()


def _read_secrets(place: str | None) -> dict[str, str]:
    """The values of the secrets that the run names. `place`: a SecretPlace as JSON; they live there and in the child's environment."""
    if place is None:
        return {}
    values: dict[str, str] = json.loads(SecretPlace.from_json(place).read())
    return values


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
