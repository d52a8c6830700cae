"""The slice that deletes itself: the last resort when nobody else is left who would, so that nothing bills for nobody.

As a rule the node provider on the head deletes slices. A host does it only when the head is lost, or when it cannot be made to join.
"""

import logging
from collections.abc import Callable
from typing import Protocol

from cluster.tpu.errors import NotFoundError, TPUError

logger = logging.getLogger(__name__)

RETRY_S = 30.0


class SliceApi(Protocol):
    """What is needed of TpuApi."""

    def delete_queued_resource(self, zone: str, name: str) -> str: ...

    def delete_node(self, zone: str, name: str) -> str: ...


class OwnSlice:
    """The slice that this host belongs to. `owned`: whether podlaunch made it; one that the user made is never deleted."""

    def __init__(self, name: str, zone: str, connect: Callable[[], SliceApi], clock: Callable[[], float], *, owned: bool) -> None:
        self._name, self._zone, self._connect, self._clock, self._owned = name, zone, connect, clock, owned
        self._next = float("-inf")

    def delete(self, reason: str) -> bool:
        """Ask for the slice's end, at most every `RETRY_S` seconds; whoever calls does so again until the host is gone. Does not wait.

        Returns whether it was asked for now. What the service refuses is logged, and asked again the next time.
        """
        if self._clock() < self._next:
            return False
        self._next = self._clock() + RETRY_S
        if not self._owned:
            logger.warning("slice %s is not podlaunch's to delete, so it stays: %s", self._name, reason)
            return False
        logger.warning("slice %s deletes itself: %s", self._name, reason)
        try:
            self._ask(self._connect())
        except TPUError as error:
            logger.error("it could not: %s", error)
            return False
        return True

    def _ask(self, api: SliceApi) -> None:
        """The queued resource with its node, or the plain node."""
        for delete in (api.delete_queued_resource, api.delete_node):
            try:
                delete(self._zone, self._name)
            except NotFoundError:
                continue
            return
