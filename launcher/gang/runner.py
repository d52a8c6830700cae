"""The runner: one thin Ray actor per host. Holds the host's chips for the whole run; training runs in its child process
(launcher/gang/child.py). The child ends with its runner, and the runner with its supervisor.

A supervisor asks its runners all the time; when none has asked for a while (launcher/gang/lease.py) the child is killed: this host may be
cut off, and the run may be going on elsewhere.

When the host's agent announces the end of the host (cluster/vm/host_dir.py), the runner tells the supervisor and asks its child to
checkpoint and end at the next step: by SIGTERM, and by a byte in a pipe, which a user's program can look for at any time
(launcher/training/script.py). A process that was asked and ends with exit code 0 has stopped (143), unless it said that it was done.
"""

import contextlib
import json
import logging
import math
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from cluster.errors import PodlaunchError
from cluster.secret_place import SecretPlace
from cluster.state import cache_dir
from cluster.vm.host_dir import HOST_DIR_VARIABLE, Notice, read_notice, write_companion
from launcher import code, programs
from launcher.config import LaunchConfig
from launcher.gang.child import Child, Event
from launcher.gang.echo import echo
from launcher.gang.lease import LEASE_S
from launcher.gang.mirror import open_place
from launcher.gang.nursery import COMMAND as NURSERY
from launcher.gang.nursery import Borrowing, borrow
from launcher.gang.stacks import stacks_of
from launcher.process_variables import HURRY

if TYPE_CHECKING:
    from launcher.gang.gauges import HostGauges

logger = logging.getLogger(__name__)

NOTICE_INTERVAL_S = 0.25
"""How often the agent's file is looked at."""
SPARE_AFTER_S = 5.0
"""How long a process trains before its host makes a spare: a run that is over by then needs none."""
WEIGH_S = 5.0
"""How often the memory of the training process is looked at."""
_CHILD = (sys.executable, "-m", "launcher.training.child")

# What the child must not take over from the Ray worker that its runner is.
_NOT_FOR_CHILDREN = ("RAY_", "MEGASCALE_", "PYTHONPATH", "OMP_NUM_THREADS")


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
        compiled = cache_dir() / "compilation"
        try:
            programs.fetch(self._place.files, compiled)
        except (PodlaunchError, OSError) as error:
            logger.warning("what was compiled for the run before is not used: %s", error)
        self._static = env | {
            "PYTHONPATH": str(unpacked / "podlaunch"),
            "PYTHONSAFEPATH": "1",
            "PODLAUNCH_USER_CODE": str(unpacked / "user"),
            "PODLAUNCH_COMPILATION_CACHE": str(compiled),
            "PODLAUNCH_RUN_DIR": str(self._place.folder),
            "PODLAUNCH_CHECKPOINT_DIR": self._place.checkpoints,
        }
        self._spares = LaunchConfig.from_yaml(self._place.folder / "config.yaml").run.spares
        self._fetched = attempt

    def _begin_ahead(self, attempt: int) -> None:
        try:
            self._fetch(attempt)
            if self._spares:
                env = {**self._static, HURRY: "1"}
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


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_secrets(place: str | None) -> dict[str, str]:
    """The values of the secrets that the run names. `place`: a SecretPlace as JSON; they live there and in the child's environment."""
    if place is None:
        return {}
    values: dict[str, str] = json.loads(SecretPlace.from_json(place).read())
    return values


def _is_under_way(event: Event) -> bool:
    return event.get("event") == "step" or event.get("phase") == "script"
