"""One slice on its way to READY: looked at again and again, each time moved one step on.

The step follows from what the API shows, so it does not matter who began: a slice that is there already is waited for or kept, a lost one
is deleted and made anew, and a zone that refuses gives way to the next.
"""

import logging
from collections.abc import Callable, Sequence

from cluster.tpu.api import Slice, TpuApi
from cluster.tpu.errors import AlreadyExistsError, NotFoundError, PreemptedError, TPUError, UnknownError
from cluster.tpu.lifecycle import Life, life

log = logging.getLogger(__name__)


class Bringup:
    """Moves the slice `name` to READY, one `step` at a time."""

    def __init__(self, name: str, zones: Sequence[str], api: TpuApi, create: Callable[[str, str], str | None]) -> None:
        """`create(name, zone)` asks for the slice and returns the operation's name, None when that was lost."""
        self.name = name
        self.ready = False
        self.last_seen = "not asked for yet"
        self._api, self._create = api, create
        self._untried = list(zones)
        self._waiting = False  # whether the first of the untried zones has been asked and has not refused
        self._operation: str | None = None
        self._created_in: set[str] = set()

    def step(self, node: Slice | None) -> bool:
        """Do what follows from `node`, what the API shows now; True when it is READY.

        Raises TPUError when every zone has refused, or one has refused in a way that another zone does not change.
        """
        now = life(node)
        self.last_seen = f"{node.state} in {node.zone}" if node is not None else "not there"
        _STEPS[now](self, node)
        self.ready = now is Life.READY
        return self.ready

    def undo(self) -> None:
        """Delete what `step` has created; what cannot be deleted is logged, since this runs while another error is on its way."""
        for zone in sorted(self._created_in):
            try:
                self._api.delete_node(zone, self.name)
            except NotFoundError:
                continue
            except TPUError as error:
                log.warning("left behind: %s", error)

    def _keep(self, _: Slice | None) -> None:
        """Nothing to do but to look again."""

    def _make(self, _: Slice | None) -> None:
        if self._waiting:
            if self._failed_operation():
                return
            if self._operation is not None:  # it runs, and the node does not show yet
                return
            self._refused(UnknownError("it was accepted and is not there", resource=self.name, zone=self._untried[0]))
        zone = self._untried[0]
        self._created_in.add(zone)
        try:
            self._operation = self._create(self.name, zone)
            self._waiting = True
        except AlreadyExistsError:
            self._created_in.discard(zone)  # somebody was faster; the next look decides whose it is
        except TPUError as error:
            self._refused(error)

    def _watch(self, node: Slice | None) -> None:
        assert node is not None
        if self._waiting and self._failed_operation():
            self._delete(node)

    def _replace(self, node: Slice | None) -> None:
        assert node is not None
        self._delete(node)
        if self._waiting:
            self._refused(PreemptedError(f"it became {node.state} before it was READY", resource=self.name, zone=node.zone))

    def _failed_operation(self) -> bool:
        """Whether the creation under way has failed; then the zone counts as refusing. A finished one is forgotten."""
        if self._operation is None:
            return False
        zone = self._untried[0]
        try:
            operation = self._api.get_operation(self._operation, resource=self.name, zone=zone)
        except NotFoundError:
            self._operation = None  # the service forgets operations; the node's own state tells
            return False
        if operation.done:
            self._operation = None
        if operation.error is not None:
            self._refused(operation.error)
            return True
        return False

    def _refused(self, error: TPUError) -> None:
        """Go on to the next zone, or raise `error` when there is none or it would refuse as well."""
        self._waiting, self._operation = False, None
        zone = self._untried.pop(0)
        if not self._untried or not error.another_zone_may_help:
            raise error
        log.warning("%s; trying %s instead of %s", error, self._untried[0], zone)

    def _delete(self, node: Slice) -> None:
        try:
            self._api.delete_node(node.zone, node.name)
        except NotFoundError:
            return


_STEPS: dict[Life, Callable[[Bringup, Slice | None], None]] = {
    Life.GONE: Bringup._make,
    Life.PENDING: Bringup._watch,
    Life.INTERRUPTED: Bringup._keep,
    Life.READY: Bringup._keep,
    Life.LOST: Bringup._replace,
    Life.DELETING: Bringup._keep,
}
