"""Slices on their way to READY: looked at again and again, each time moved one step on.

The step follows from what the API shows, so it does not matter who began: a slice that is there already is waited for or kept, a lost one
is deleted and made anew, and a zone that refuses gives way to the next.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from cluster.repeat import SAFE
from cluster.tpu.errors import PreemptedError, TPUError, TransientError
from cluster.tpu.lifecycle import Action, Life
from cluster.tpu.slices import ClusterSlice, best_first

if TYPE_CHECKING:
    from cluster.tpu.provider import TPUProvider

log = logging.getLogger(__name__)
_PASSING = (*SAFE, PreemptedError)
"""What is not a reason to give up: the next look tells what became of it, and it is asked for again where nothing did."""


class Bringup:
    """Moves the slices `names` to READY, one `step` at a time."""

    def __init__(
        self,
        provider: "TPUProvider",
        names: Sequence[str],
        labels: Mapping[str, str],
        metadata: Mapping[str, str],
        progress: Callable[[str], None],
    ) -> None:
        self._provider, self._names, self._labels, self._metadata, self._progress = provider, names, labels, metadata, progress
        self._seen: dict[str, str] = dict.fromkeys(names, "not asked for yet")
        self._ready: set[str] = set()
        self._before: set[tuple[str, str]] | None = None
        self._made: set[str] = set()
        """The names that this call has tried to create."""
        self.slices: list[ClusterSlice] = []
        """All of the cluster's, as the last step has seen them."""

    def step(self) -> bool:
        """Do what follows from what the API shows now; True when all are READY.

        Raises TPUError when every zone has refused, or one has refused in a way that another zone does not change. A service that stumbles
        ends it at the first step only: later there may be slices, which only waiting finds again.
        """
        try:
            self.slices = self._provider.sweep()
        except SAFE as error:
            if self._before is None:
                raise
            self._progress(f"looking again: {error}")
            return False
        found = [item for item in self.slices if item.name in self._seen]
        if self._before is None:
            self._before = {(item.zone, item.name) for item in found}
        best = {name: best_first([item for item in found if item.name == name]) for name in self._names}
        wanting = [name for name in self._names if self._next(name, best[name][0] if best[name] else None) is Action.CREATE]
        unseen = self._provider.unseen()
        for name in [name for name in wanting if name in unseen]:
            self._say(name, "asked for in a zone that does not answer")
            wanting.remove(name)
        if wanting:
            self._create(wanting)
        return len(self._ready) == len(self._names)

    def waiting(self) -> str:
        """What is not READY, for an error's text."""
        said = [f"{name} ({self._seen[name]})" for name in self._names if name not in self._ready]
        return "; ".join([", ".join(said), *self._provider.policy.describe(self._provider.kind, self._provider.zones)])

    def undo(self) -> None:
        """Delete what `step` has created; what cannot be deleted is logged, since this runs while another error is on its way."""
        if not self._made:
            return
        try:
            view = self._provider.look()
        except TPUError as raised:
            errors = [raised]
        else:
            mine = [item for item in view.slices if item.name in self._made and (item.zone, item.name) not in (self._before or ())]
            errors = self._provider.delete_all([item for item in mine if item.step.unwanted is Action.DELETE])
            if view.hidden:
                errors.append(TransientError("it does not answer", resource=", ".join(sorted(view.hidden))))
        for error in errors:
            log.warning("something may be left behind, `tpu stop %s` deletes it: %s", self._provider.config.name, error)

    def _next(self, name: str, item: ClusterSlice | None) -> Action:
        if item is not None:
            self._provider.check_ours(item)
        self._say(name, f"{item.state} in {item.zone}" if item is not None else "not there")
        if item is not None and item.life is Life.READY:
            self._ready.add(name)
        else:
            self._ready.discard(name)
        return item.step.wanted if item is not None else Action.CREATE

    def _create(self, names: Sequence[str]) -> None:
        # Before the requests: an interrupt must not make us forget them. Nothing of these names is there, so what comes now is ours.
        self._made.update(names)
        self._before = {key for key in self._before or () if key[1] not in names}
        made = self._provider.create_slices(names, labels=self._labels, metadata=self._metadata)
        for name, result in zip(names, made, strict=True):
            if not isinstance(result, TPUError):
                self._say(name, f"{'found' if result.adopted else 'asked for'} in {result.zone}")
                if result.adopted:
                    self._made.discard(name)
            elif isinstance(result, _PASSING):
                log.info("%s", result)
            else:
                raise result

    def _say(self, name: str, text: str) -> None:
        if self._seen[name] != text:
            self._seen[name] = text
            self._progress(f"{name}: {text}")
