"""The runner: one thin Ray actor per host. Holds the host's chips for the whole run; training runs in its child process.

A child is started by a thread that lives as long as the child: the kernel sends its PR_SET_PDEATHSIG when the THREAD that started it
ends, not the process. The child ends with its runner, and the runner with its supervisor.

A supervisor asks its runners all the time; when none has asked for a while (launcher/gang/lease.py) the child is killed: this host may be
cut off, and the run may be going on elsewhere.

When the host's agent announces the end of the host (cluster/vm/host_dir.py), the runner tells the supervisor and asks its child to
checkpoint and end at the next step: by SIGTERM, and by a byte in a pipe, which a user's program can look for at any time
(launcher/training/script.py). A process that was asked and ends with exit code 0 has stopped (143), unless it said that it was done.
"""

import codecs
import contextlib
import json
import logging
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import psutil

from cluster.errors import PodlaunchError
from cluster.secret_place import SecretPlace
from cluster.state import cache_dir
from cluster.vm.host_dir import HOST_DIR_VARIABLE, Notice, read_notice, write_companion
from launcher import code
from launcher.config import LaunchConfig
from launcher.gang.attempt import EXIT_STOPPED
from launcher.gang.evidence import first_error, sickness
from launcher.gang.lease import LEASE_S
from launcher.gang.memory import OomWatch
from launcher.gang.mirror import Place, open_place
from launcher.gang.nursery import COMMAND as NURSERY
from launcher.gang.nursery import Borrowed, Borrowing, borrow
from launcher.gang.pipes import Pipes, start
from launcher.gang.stacks import stacks_of

if TYPE_CHECKING:
    from launcher.gang.gauges import HostGauges

logger = logging.getLogger(__name__)

Event = dict[str, Any]

NOTICE_INTERVAL_S = 0.25
"""How often the agent's file is looked at."""
LAST_WORDS_S = 10.0
"""How long the end of a process that failed may be kept from the supervisor until the last of its log is sent."""
SPARE_AFTER_S = 5.0
"""How long a process trains before its host makes a spare: a run that is over by then needs none."""
HURRY_VARIABLE = "PODLAUNCH_HURRY"
"""Of a spare: nobody trains on this host yet, and its orders are about to come (launcher/training/spare.py)."""
ECHO_S = 1.0
"""How often what a training process wrote is shown in Ray's dashboard."""
WEIGH_S = 5.0
"""How often the memory of the training process is looked at."""
_CHILD = (sys.executable, "-m", "launcher.training.child")
_TAIL_BYTES = 64 * 1024

# What the child must not take over from the Ray worker that its runner is.
_NOT_FOR_CHILDREN = ("RAY_", "MEGASCALE_", "PYTHONPATH", "OMP_NUM_THREADS")


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


class Runner:
    """The actor. Its methods run in a pool of threads, so that `next_events` may block while others are called."""

    def __init__(
        self,
        run_dir: str,
        host: int,
        lease: float = LEASE_S,
        gauges: Callable[[], "HostGauges | None"] = lambda: None,
        *,
        first: int | None = None,
    ) -> None:
        """`run_dir`: a local path or gs://. `lease`: seconds that the child lives on after the last question. `gauges`: makes what shows
        the host to Prometheus. `first`: the attempt that will be started here first; its process imports what it needs while the rest of
        the gang is placed.
        """
        self._url = run_dir
        self._gauges = gauges()
        self._weighed = -math.inf
        self._place = open_place(run_dir, host, cache_dir())
        self._host = host
        self._events: queue.Queue[Event] = queue.Queue()
        self._child: Child | None = None
        self._told: Notice | None = None
        self._spares = False
        self._spare: Child | None = None
        self._spare_at = math.inf
        """When the next one is due, seconds of the monotonic clock."""
        self._static: dict[str, str] = {}
        """The environment of training processes that no attempt changes."""
        self._fetched: int | None = None
        """The attempt that the run's folder on this host is ready for, and that has not begun."""
        self._lease = lease
        self._lock = threading.Lock()
        self._asking = 0
        """Questions that wait for an answer now."""
        self._asked = time.monotonic()
        folder = os.environ.get(HOST_DIR_VARIABLE)
        self._folder = None if folder is None else Path(folder)
        """The host's."""
        self._nursery: Borrowing | None = None
        """Held open: the nursery ends what it has lent when this runner ends."""
        if self._folder is not None:
            threading.Thread(target=self._watch_notices, args=(self._folder,), name="notices", daemon=True).start()
        if first is not None:
            self._begin_ahead(first)

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

    def start(self, attempt: int, environment: Mapping[str, str], log: str, secrets: str | None) -> int:
        """Start the training process of this host; its process id. Raises OSError when it cannot be started."""
        self.kill()
        if self._fetched != attempt:
            self._fetch(attempt)
        self._fetched = None
        arguments = [str(self._place.folder), "--attempt", str(attempt), "--run", self._url, "--checkpoints", self._place.checkpoints]
        own = {"PODLAUNCH_ATTEMPT": str(attempt), **_read_secrets(secrets), **environment}
        self.renew()
        written = self._place.folder / log
        before = _size(written)
        self._child = self._from_spare(arguments, own, written) or Child(
            [*_CHILD, *arguments], {**self._static, **own}, written, self._events, self._place
        )
        threading.Thread(target=self._watch_supervisor, args=(self._child,), name="lease", daemon=True).start()
        threading.Thread(target=echo, args=(self._child.wait, written, before, sys.stdout), name="echo", daemon=True).start()
        self._spare_at = math.inf
        self._told = None  # this child and whoever waits for it have not heard of a notice that holds already
        return self._child.pid

    def _fetch(self, attempt: int) -> None:
        unpacked = code.unpack(self._place.fetch(attempt), cache_dir() / "code")
        env = {key: value for key, value in os.environ.items() if not key.startswith(_NOT_FOR_CHILDREN)}
        self._static = env | {
            "PYTHONPATH": str(unpacked / "podlaunch"),
            "PYTHONSAFEPATH": "1",
            "PODLAUNCH_USER_CODE": str(unpacked / "user"),
            "PODLAUNCH_COMPILATION_CACHE": str(cache_dir() / "compilation"),
            "PODLAUNCH_RUN_DIR": str(self._place.folder),
            "PODLAUNCH_CHECKPOINT_DIR": self._place.checkpoints,
        }
        self._spares = LaunchConfig.from_yaml(self._place.folder / "config.yaml").run.spares
        self._fetched = attempt

    def _begin_ahead(self, attempt: int) -> None:
        try:
            self._fetch(attempt)
            if self._spares:
                env = {**self._static, HURRY_VARIABLE: "1"}
                self._spare = self._borrow() or Child([*_CHILD, str(self._place.folder)], env, None, queue.Queue(), self._place)
        except (PodlaunchError, OSError) as error:
            logger.warning("nothing is imported ahead: %s", error)  # `start` meets the same, and tells the supervisor

    def _borrow(self) -> Child | None:
        """What the host's nursery keeps warm; where there is no nursery yet, the host's agent is asked for one."""
        if self._folder is None:
            return None
        write_companion(self._folder, NURSERY)
        self._nursery = borrow(self._folder)
        if self._nursery is None or self._nursery.lent is None:
            return None
        return Child([], self._static, None, queue.Queue(), self._place, self._nursery.lent)

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
        self._measure(found)
        if self._spares and self._spare_at == math.inf and any(_is_under_way(event) for event in found):
            self._spare_at = time.monotonic() + SPARE_AFTER_S
        if self._spare is None and time.monotonic() >= self._spare_at:
            self._spare = Child([*_CHILD, str(self._place.folder)], self._static, None, queue.Queue(), self._place)
        return found

    def _measure(self, events: Iterable[Event]) -> None:
        if self._gauges is None:
            return
        self._gauges.hear(events)
        if self._child is not None and time.monotonic() - self._weighed >= WEIGH_S:
            self._weighed = time.monotonic()
            with contextlib.suppress(psutil.NoSuchProcess):
                self._gauges.memory(psutil.Process(self._child.pid).memory_info().rss)

    def renew(self) -> None:
        """The supervisor lives, and asks later."""
        with self._lock:
            self._asked = time.monotonic()

    def _from_spare(self, arguments: list[str], environment: Mapping[str, str], log: Path) -> Child | None:
        spare, self._spare = self._spare, None
        return spare if spare is not None and spare.order(arguments, environment, log, self._events) else None

    def profile(self, request: str) -> None:
        """Ask the child for a profile (launcher/profiles.py)."""
        if self._child is not None:
            self._child.request(request)

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


def echo(wait: Callable[[float], bool], log: Path, begin: int, output: TextIO) -> None:
    """What a training process writes, once more among the logs that Ray's dashboard shows of this actor. `wait`: whether the process has
    ended within so many seconds. `begin`: the length of `log` before it began.
    """
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    ended = False
    while not ended:
        ended = wait(ECHO_S)
        try:
            with log.open("rb") as file:
                file.seek(begin)
                new = file.read()
            output.write(decode(new))
            output.flush()
        except FileNotFoundError:
            continue  # a spare makes it when it has its orders
        except OSError as error:  # such as a full disk: the log itself is what counts
            logger.warning("the log is not repeated here: %s", error)
            return
        begin += len(new)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


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


def _is_under_way(event: Event) -> bool:
    return event.get("event") == "step" or event.get("phase") == "script"


def _says_done(event: Event) -> bool:
    return event.get("event") == "finished" or (event.get("event") == "step" and event.get("step") == event.get("total_steps"))


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace")
