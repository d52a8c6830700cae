"""What the metadata server says about the end of this host: preemption and maintenance.

instance/preempted               TRUE once the host is being preempted; it never goes back, so it is latched
instance/maintenance-event       TERMINATE_ON_HOST_MAINTENANCE while the host is about to be taken down; NONE takes it back
instance/upcoming-maintenance    announced up to days before; counts once it is ONGOING or its window is about to open
"""

import datetime
import json
import logging
from collections.abc import Callable
from typing import Any

from cluster.errors import ClusterError
from cluster.vm.host_dir import Notice, NoticeKind
from cluster.vm.metadata import Fetch

logger = logging.getLogger(__name__)

UPCOMING_INTERVAL_S = 60.0
"""An announcement comes long before, so it need not be asked for every second."""


class NoticeWatch:
    """Asks the metadata server whenever `poll` is called. A server that stumbles (503 during an event is known) changes nothing."""

    def __init__(self, fetch: Fetch, clock: Callable[[], float], notice_s: float) -> None:
        """`clock`: seconds since the epoch. `notice_s`: how long after its notice the host ends."""
        self._fetch, self._clock, self._notice_s = fetch, clock, notice_s
        self._now: Notice | None = None
        self._upcoming: Notice | None = None
        self._asked_upcoming = float("-inf")
        self._silent = False

    def poll(self) -> Notice | None:
        """The notice that holds now; the same object for as long as it is the same notice."""
        if self._now is not None and self._now.kind is NoticeKind.PREEMPTED:
            return self._now
        try:
            self._now = self._look()
            self._silent = False
        except ClusterError as error:
            if not self._silent:
                logger.warning("no news of preemption or maintenance: %s", error)
            self._silent = True
        return self._now

    def _look(self) -> Notice | None:
        if self._fetch("instance/preempted").strip().upper() == "TRUE":
            return self._notice(NoticeKind.PREEMPTED)
        before = self._now
        event = self._fetch("instance/maintenance-event").strip()
        if event.startswith("TERMINATE"):
            return before if before is not None else self._notice(NoticeKind.MAINTENANCE)
        return self._look_ahead()

    def _notice(self, kind: NoticeKind) -> Notice:
        return Notice(kind, self._clock(), self._clock() + self._notice_s)

    def _look_ahead(self) -> Notice | None:
        now = self._clock()
        if now - self._asked_upcoming >= UPCOMING_INTERVAL_S:
            self._asked_upcoming = now
            starts = self._window_start()
            if starts is None or starts - now > max(self._notice_s, UPCOMING_INTERVAL_S):
                self._upcoming = None
            elif self._upcoming is None:
                self._upcoming = Notice(NoticeKind.MAINTENANCE, now, max(starts, now + self._notice_s))
        return self._upcoming

    def _window_start(self) -> float | None:
        """When the announced maintenance begins, seconds since the epoch; None while nothing is announced."""
        try:
            found = json.loads(self._fetch("instance/upcoming-maintenance?recursive=true"))
            values = {key.replace("_", "").lower(): value for key, value in found.items()}
            return self._clock() if values.get("maintenancestatus") == "ONGOING" else _seconds(values.get("windowstarttime"))
        except (ClusterError, ValueError, AttributeError):
            # Most VMs have no such key, and one without news answers with a sentence: both mean that nothing is announced.
            return None


def _seconds(time: Any) -> float | None:
    """From RFC 3339 text. Raises ValueError."""
    return None if not isinstance(time, str) else datetime.datetime.fromisoformat(time).timestamp()
