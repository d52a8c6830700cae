"""A profile that somebody asked for, on its way through the gang of one attempt."""

from collections.abc import Mapping
from typing import Any

from launcher.profiles import ProfileRequest

ANSWERS = frozenset({"profile", "profile_failed"})
"""Events of training processes (launcher/training/profiling.py)."""


class Profiling:
    """Of an attempt with so many hosts. A request that an attempt did not finish is taken up by the next one."""

    def __init__(self, hosts: int) -> None:
        self._hosts = hosts
        self._under_way: ProfileRequest | None = None
        self._open: set[int] = set()

    def to_send(self, wanted: ProfileRequest | None) -> ProfileRequest | None:
        """What the hosts have to be told now. `wanted`: what the run directory asks for."""
        if wanted is None or wanted == self._under_way:
            return None
        self._under_way, self._open = wanted, set(range(self._hosts))
        return wanted

    def done(self, index: int, answer: Mapping[str, Any]) -> bool:
        """Whether this was the last answer to what is under way."""
        if self._under_way is None or answer["id"] != self._under_way.id or index not in self._open:
            return False
        self._open.discard(index)
        return not self._open
