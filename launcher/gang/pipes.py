"""A training process and the pipes between it and its runner."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.process_variables import EVENT_FD, ORDERS_FD, PARENT_PID, REQUEST_FD, STOP_FD


@dataclass(frozen=True)
class Pipes:
    """The runner's ends, file descriptors."""

    events: int
    """What the process says."""
    stop: int
    """What is written here asks it to end."""
    requests: int
    """For profiles."""
    held: tuple[int, ...]
    """The process's own ends of the last two: writing there is then no error when the process has gone."""
    orders: int | None = None
    """Of a spare."""

    @property
    def all(self) -> list[int]:
        return [self.events, self.stop, self.requests, *self.held, *([] if self.orders is None else [self.orders])]

    @classmethod
    def of(cls, ends: Sequence[int]) -> "Pipes":
        """A spare's, as `all` lists them."""
        events, stop, requests, stop_held, requests_held, orders = ends
        return cls(events, stop, requests, (stop_held, requests_held), orders)

    def close(self) -> None:
        for end in self.all:
            os.close(end)


def start(argv: Sequence[str], env: Mapping[str, str], output: int, *, spare: bool) -> tuple[subprocess.Popen[bytes], Pipes]:
    """A process with its output going to that file descriptor. Raises OSError, and leaves nothing then.

    The kernel ends it when the THREAD that calls this ends (PR_SET_PDEATHSIG).
    """
    events, events_given = os.pipe()
    stop_given, stop = os.pipe()
    requests_given, requests = os.pipe()
    orders_given, orders = os.pipe() if spare else (None, None)
    pipes = Pipes(events, stop, requests, (stop_given, requests_given), orders)
    given = {EVENT_FD: events_given, STOP_FD: stop_given, REQUEST_FD: requests_given}
    if orders_given is not None:
        given[ORDERS_FD] = orders_given
    own = {PARENT_PID: str(os.getpid()), **{name: str(fd) for name, fd in given.items()}}
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**env, **own}, pass_fds=list(given.values())
        )
    except OSError:
        pipes.close()
        raise
    finally:
        os.close(events_given)
        if orders_given is not None:
            os.close(orders_given)
    return process, pipes
