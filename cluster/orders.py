"""The slices that Ray has asked for and that no listing shows yet.

An order stands from Ray's request until a listing shows its slice, and Ray is shown it as a slice that waits. So whatever the service
refuses, loses or leaves open, Ray waits and asks once: nothing is made twice for one demand, and a place in a queue is not lost. (Ray's
autoscaler keeps a record of every launch that failed, for ever, and goes through all of them at each tick; refusals told to it one by one
would slow it down until it stands still.)
"""

import dataclasses
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from cluster.tpu.errors import TPUError

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 15.0, 300.0
"""Between tries after what the zones' policy does not know, such as a missing permission: somebody has to do something first."""
_MISSES = 2
"""A slice that was accepted and that so many listings lack is asked for again."""


@dataclass(frozen=True)
class Order:
    """One slice that Ray wants."""

    name: str
    node_type: str
    request: str
    """Ray's launch request."""
    asked: bool = False
    """It was tried, so its slice may be there whatever came back."""
    under_way: bool = False
    """A thread is asking for it."""
    accepted_at: float | None = None
    """When the service took it."""
    misses: int = 0
    """How many listings since then have lacked it."""
    shown: bool = False
    """Ray has been shown it, and so will see it go."""
    cancelled: bool = False
    next_try: float = float("-inf")
    pause: float = _FIRST_PAUSE_S
    error: TPUError | None = None
    """What the last try came to, where the zones' policy does not tell it."""


class Orders:
    """What is asked for. Safe to use from several threads; never waits."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        self._orders: dict[str, Order] = {}

    def add(self, orders: Iterable[Order]) -> None:
        with self._lock:
            self._orders |= {order.name: order for order in orders}

    def get(self, name: str) -> Order | None:
        with self._lock:
            return self._orders.get(name)

    def all(self) -> list[Order]:
        with self._lock:
            return list(self._orders.values())

    def take(self, room: Callable[[str, Collection[Order]], int]) -> list[Order]:
        """The orders to be tried now, oldest first; they are under way from now on.

        `room`: how many more of a node type there may be, given all orders that may have a slice already.
        """
        with self._lock:
            due = [order for order in self._orders.values() if self._is_due(order)]
            started = [order for order in self._orders.values() if order.under_way or order.accepted_at is not None]
            left = {order.node_type: room(order.node_type, started) for order in due}
            taken = []
            for order in due:
                if left[order.node_type] > 0:
                    left[order.node_type] -= 1
                    taken.append(dataclasses.replace(order, asked=True, under_way=True))
            self._orders |= {order.name: order for order in taken}
            return taken

    def accepted(self, name: str) -> bool:
        """The service has taken it. False: Ray does not want it any more, so it has to be deleted."""
        with self._lock:
            order = self._orders[name]
            if order.cancelled:
                del self._orders[name]
                return False
            self._orders[name] = dataclasses.replace(order, under_way=False, accepted_at=self._clock(), misses=0, error=None)
            return True

    def refused(self, name: str, error: TPUError, *, told: bool) -> bool:
        """It is tried again later. `told`: the zones' policy knows of it and says at no cost when the next try makes sense.

        False: Ray does not want it any more, so whatever is there has to be deleted.
        """
        with self._lock:
            order = self._orders[name]
            if order.cancelled:
                del self._orders[name]
                return False
            if told:
                again = dataclasses.replace(order, under_way=False, error=None, pause=_FIRST_PAUSE_S)
            else:
                pause = min(order.pause * 2, _LONGEST_PAUSE_S)
                again = dataclasses.replace(order, under_way=False, error=error, pause=pause, next_try=self._clock() + order.pause)
            self._orders[name] = again
            return True

    def listed(self, standing: Collection[str], lost: Collection[str], hidden: Collection[str], began: float) -> None:
        """A listing that began at `began` has the slices `standing` and `lost`; `hidden` may be there without being in it."""
        with self._lock:
            for order in list(self._orders.values()):
                if order.under_way:
                    continue
                # One that is lost before Ray has been shown it stays for a listing: Ray waits for what it was never shown.
                if order.name in standing or (order.name in lost and order.shown):
                    del self._orders[order.name]
                elif order.accepted_at is not None and order.accepted_at < began and order.name not in hidden:
                    again = order.misses + 1 >= _MISSES
                    later = dataclasses.replace(order, misses=order.misses + 1, accepted_at=None if again else order.accepted_at)
                    self._orders[order.name] = later

    def shown(self, names: Collection[str]) -> None:
        """Ray is shown these."""
        with self._lock:
            fresh = [order for name in names if (order := self._orders.get(name)) is not None and not order.shown]
            self._orders |= {order.name: dataclasses.replace(order, shown=True) for order in fresh}

    def cancel(self, name: str) -> bool:
        """Ray does not want it any more. Whether something may be there that has to be deleted now; what is under way ends later."""
        with self._lock:
            order = self._orders.get(name)
            if order is None:
                return True
            if order.under_way:
                self._orders[name] = dataclasses.replace(order, cancelled=True)
                return False
            del self._orders[name]
            return order.asked

    def problems(self) -> list[str]:
        """A line for each reason why orders wait that the zones' policy does not tell."""
        return list(dict.fromkeys(str(order.error) for order in self.all() if order.error is not None))

    def _is_due(self, order: Order) -> bool:
        return not order.under_way and order.accepted_at is None and self._clock() >= order.next_try
