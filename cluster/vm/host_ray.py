"""Keeps one process of a machine alive, a `ray start --block` or what is beside it: started when it may be, started again after it ended,
given up when that leads nowhere.

DOWN --(it may start and its pause is over)--> UP --(it ended)--> DOWN
"""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from cluster import processes
from cluster.processes import ProcessRecord
from cluster.vm.host_dir import living_ray, write_ray
from cluster.vm.restart import restart_delays

logger = logging.getLogger(__name__)

HEALTHY_S = 60.0
"""A Ray that lived so long was well: the pauses begin anew."""
JOINED_S = 10.0
"""A Ray that lived so long has joined the cluster, as a rule."""
RETRY_S = 10.0
"""Pause after a start that could not even be tried, such as without the right to read the token."""
FAILING = 8
"""So many starts in a row that led nowhere (about two minutes of pauses): this host cannot be made to join."""


class HostRay:
    """All calls come from one thread. A Ray that an earlier agent left running is taken over, with all that runs on it."""

    def __init__(
        self,
        start: Callable[[], ProcessRecord],
        folder: Path,
        clock: Callable[[], float],
        *,
        rejoin_after: float = 0.0,
        what: str = "Ray",
    ) -> None:
        """`start` starts it in a session of its own. `folder`: the host's, where it is written down. `clock`: monotonic seconds.
        `rejoin_after`: pause, in seconds, before a host that had joined comes back.
        """
        self._start, self._folder, self._clock = start, folder, clock
        self._rejoin_after = rejoin_after
        self._what = what
        self._record = living_ray(folder)
        self._since = float("-inf")  # of one that is taken over: it has joined, whenever it did
        self._next = float("-inf")
        self._delays = restart_delays()
        self._short_lives = 0
        if self._record is not None:
            logger.info("taking over %s, process %d, from the agent before", what, self._record.pid)

    @property
    def up(self) -> bool:
        return self._record is not None

    @property
    def failing(self) -> bool:
        return self._short_lives >= FAILING

    @property
    def since(self) -> float:
        """When it was last started, by the clock; of one that was taken over, and before the first, -inf."""
        return self._since

    def tick(self, *, may_start: bool, replace: bool = False) -> None:
        """Raises what `start` raises; it is tried again after a pause. `replace`: what was started last is of no use any more; as soon as
        it may, the next one takes its place, without a pause.
        """
        if self._record is not None:
            processes.reap(self._record)
            if self._record.alive() and not (replace and may_start):
                return
            self._ended(self._record, replaced=replace)
        elif may_start and self._clock() >= self._next:
            self._next, self._since = self._clock() + RETRY_S, self._clock()
            self._record = self._start()
            write_ray(self._folder, self._record)

    def ask_to_end(self) -> None:
        """SIGTERM: Ray drains the node with the reason PREEMPTION, lets what runs on it go on, and ends once it is idle or at the end of
        RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S.
        """
        if self._record is not None and self._record.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._record.pid, signal.SIGTERM)

    def end(self, grace: float, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """SIGTERM, and SIGKILL to the whole of Ray on this host after `grace` seconds."""
        if self._record is None:
            return
        self.ask_to_end()
        deadline = self._clock() + grace
        while self._record.alive() and self._clock() < deadline:
            processes.reap(self._record)
            sleep(0.05)
        self._kill_group(self._record)

    def _ended(self, record: ProcessRecord, *, replaced: bool) -> None:
        lived = self._clock() - self._since
        self._kill_group(record)  # what it left behind would meet the next one
        self._record = None
        write_ray(self._folder, None)
        if replaced:
            self._next = self._clock()
            logger.warning("%s ended after %.0f s, or was ended: it is started anew", self._what, lived)
            return
        if lived >= HEALTHY_S:
            self._delays, self._short_lives = restart_delays(), 0
        else:
            self._short_lives += 1
        delay = next(self._delays)
        if lived >= JOINED_S:
            delay = max(delay, self._rejoin_after)
        self._next = self._clock() + delay
        logger.warning("%s ended after %.0f s; not started again for %.0f s", self._what, lived, delay)

    def _kill_group(self, record: ProcessRecord) -> None:
        """`ray start --block` keeps what it starts in its own process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(record.pid, signal.SIGKILL)
        processes.reap(record)
