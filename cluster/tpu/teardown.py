"""Slices on their way out: looked at again and again until none is left.

One that cannot be deleted, or a zone that does not answer, does not keep the others from it: they bill until they are gone.
"""

import logging
from typing import TYPE_CHECKING

from cluster.repeat import SAFE
from cluster.tpu.lifecycle import Action
from cluster.tpu.slices import ClusterSlice, Stopwatch

if TYPE_CHECKING:
    from cluster.tpu.provider import TPUProvider

log = logging.getLogger(__name__)


class Teardown:
    """Deletes all slices of a cluster, one `step` at a time."""

    def __init__(self, provider: "TPUProvider", stopwatch: Stopwatch) -> None:
        self._provider, self._stopwatch = provider, stopwatch
        self._left: list[str] = []
        self._looked = False
        self._repeated: set[tuple[str, str]] = set()
        self.found: set[tuple[str, str]] = set()
        """Zone and name of all that was there."""

    def step(self, *, late: bool) -> bool:
        """Ask for the end of what is there; True when nothing is left. `late`: what is being deleted is asked for once more.

        Raises TPUError when the service refuses in a way that waiting does not change, after all have been tried; when it stumbles, at the
        first step only.
        """
        try:
            view = self._provider.look()
        except SAFE as raised:
            if not self._looked:
                raise
            self._left = [str(raised)]
            return False
        self._looked = True
        slices = self._stopwatch.judge(view.slices, view.hidden)
        self.found |= {(item.zone, item.name) for item in slices}
        errors = self._provider.delete_all([item for item in slices if self._is_due(item, late)])
        self._left = [f"{item.name} in {item.zone} ({item.state})" for item in slices]
        self._left += [f"perhaps more in {zone}, which does not answer" for zone in sorted(view.hidden)]
        self._left += [str(error) for error in errors]
        for error in errors:
            log.warning("%s", error)
        lasting = [error for error in errors if not isinstance(error, SAFE)]
        if lasting:
            raise lasting[0]
        return not slices and not view.hidden

    def left(self) -> str:
        """What is still there, for an error's text."""
        return ", ".join(self._left)

    def _is_due(self, item: ClusterSlice, late: bool) -> bool:
        key = (item.zone, item.name)
        if item.step.unwanted is Action.DELETE or item.given_up:
            return True
        if late and key not in self._repeated:
            self._repeated.add(key)
            return True
        return False
