"""Where a supervisor's words about its run are written: by a thread of its own, in the order in which they were said.

A run directory that does not answer for a while must not hold its supervisor up: the runners would take it for dead and end their training
processes (launcher/gang/lease.py). So status and events wait here until they can be written, however long that takes, while the gang
trains; of several statuses in a row only the newest is kept. Only who needs an answer waits, and not for ever: to claim an attempt, and
to have the run's end written down.

Every writing looks first whether the attempt is still ours (launcher/claims.py).
"""

import errno
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cluster.errors import PodlaunchError
from launcher.claims import Claims
from launcher.profiles import ProfileRequest
from launcher.runs import RunDirectory, RunStatus, StopRequest, check_transition

logger = logging.getLogger(__name__)

T = TypeVar("T")

ANSWER_LIMIT_S = 120.0
"""How long one may wait for an answer of the run directory."""
MOST_WAITING = 100_000
"""So many things to write that wait are no outage any more. An event is a few hundred bytes."""
FULL_DISK_S = 1.0
"""How long to wait before a full disk is tried again."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Unwritten(PodlaunchError):
    """The run directory does not take what has to be written. Nothing is known of the run's end then: it is unfinished."""


@dataclass
class _Task:
    work: Callable[[], Any]
    status: bool = False
    """It may be replaced by a newer one of this kind."""
    done: "Future[Any]" = field(default_factory=Future)


class Desk:
    """Of one supervisor. Methods raise Superseded once somebody else has claimed a later attempt, and Unwritten when the run directory
    refuses or what has to be known is not to be had; they go on to do so.
    """

    def __init__(
        self,
        directory: RunDirectory,
        before: RunStatus,
        *,
        background: bool = False,
        limit: float = ANSWER_LIMIT_S,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        """`before`: what status.json says. `background`: whether there is a thread; without one everything is written at once, and raises
        what it raises. `limit`: seconds for an answer. `wait`: returns after so many seconds.
        """
        self._directory, self._state, self._limit, self._wait = directory, before.state, limit, wait
        self._claims = Claims(directory.files)
        self._background = background
        self._changed = threading.Condition()
        self._tasks: deque[_Task] = deque()
        self._failure: PodlaunchError | None = None
        self._trouble = ""
        """Why the first of them is not written yet, where that is known."""
        self._looking: Future[None] | None = None
        self._stop: StopRequest | None = None
        self._looking_for_profile: Future[None] | None = None
        self._profile: ProfileRequest | None = None
        if background:
            threading.Thread(target=self._serve, name="desk", daemon=True).start()

    def append(self, attempt: int, event: Mapping[str, Any]) -> None:
        """Add an event."""
        self._put(_Task(lambda: self._append(attempt, event)))

    def show(self, status: RunStatus) -> None:
        """Replace status.json. Raises ValueError for a transition that the table does not know."""
        check_transition(status.run_id, self._state, status.state)
        self._state = status.state
        self._put(_Task(lambda: self._write(status), status=True))

    def write_stacks(self, attempt: int, host: int, stacks: str) -> None:
        self._put(_Task(lambda: self._directory.write_stacks(attempt, host, stacks)))

    def stop_requested(self) -> StopRequest | None:
        """What was found when the run directory was last asked; it is asked again."""
        if self._looking is None or self._looking.done():
            self._looking = self._put(_Task(self._look_for_stop))
        return self._stop

    def look_for_stop(self) -> StopRequest | None:
        """What the run directory says now."""
        return self.ask(self._directory.stop_requested)

    def profile_requested(self) -> ProfileRequest | None:
        """As `stop_requested`."""
        if self._looking_for_profile is None or self._looking_for_profile.done():
            self._looking_for_profile = self._put(_Task(self._look_for_profile))
        return self._profile

    def clear_profile_request(self) -> None:
        self._put(_Task(self._directory.clear_profile_request))

    def claim(self, attempt: int, holder: str) -> bool:
        """As Claims.claim, once everything before it is written."""
        return self.ask(lambda: self._claims.claim(attempt, holder))

    def flush(self) -> None:
        """Returns when everything is written."""
        self.ask(lambda: None)

    def ask(self, work: Callable[[], T]) -> T:
        """The answer, once everything before it is written."""
        future: Future[T] = self._put(_Task(work))
        try:
            return future.result(self._limit)
        except TimeoutError:
            words = self._trouble or "it does not answer"
            raise Unwritten(f"{self._directory.url}: nothing could be written for {self._limit:.0f} s: {words}") from None

    def check(self) -> None:
        """Raises what the last writing came to."""
        if self._failure is not None:
            raise self._failure

    def _append(self, attempt: int, event: Mapping[str, Any]) -> None:
        self._claims.check(attempt)
        self._directory.append_event(event)

    def _write(self, status: RunStatus) -> None:
        self._claims.check(status.attempt)
        self._directory.replace_status(status)

    def _look_for_stop(self) -> None:
        self._stop = self._directory.stop_requested()

    def _look_for_profile(self) -> None:
        self._profile = self._directory.profile_requested()

    def _put(self, task: _Task) -> "Future[Any]":
        if not self._background:
            task.done.set_result(task.work())
            return task.done
        with self._changed:
            self.check()
            if task.status and self._tasks and self._tasks[-1].status:
                self._tasks.pop()
            if len(self._tasks) >= MOST_WAITING:
                raise Unwritten(f"{self._directory.url}: {len(self._tasks)} things wait to be written: {self._trouble or 'no answer'}")
            self._tasks.append(task)
            self._changed.notify()
        return task.done

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._tasks))
                task = self._tasks.popleft()
            try:
                result = self._try(task)
            except PodlaunchError as error:  # Superseded; or a CloudError, which no patience mends
                self._fail(error, task)
                return
            except Exception as error:  # noqa: BLE001  # the outermost loop of this thread: it ends, and its supervisor has to hear why
                self._fail(Unwritten(f"{self._directory.url}: {type(error).__name__}: {error}"), task)
                return
            task.done.set_result(result)

    def _try(self, task: _Task) -> Any:
        """A disk that is full has room again some day."""
        while True:
            try:
                result = task.work()
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                if not self._trouble:
                    logger.warning("status and events of %s wait until there is room: %s", self._directory.run_id, error)
                self._trouble = str(error)
                self._wait(FULL_DISK_S)
            else:
                self._trouble = ""
                return result

    def _fail(self, error: PodlaunchError, task: _Task) -> None:
        with self._changed:
            self._failure = error
            left, self._tasks = [task, *self._tasks], deque()
        for one in left:
            one.done.set_exception(error)
