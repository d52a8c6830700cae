"""Checkpoints: saved in the background, sealed with a manifest, verified before use. The one module that knows Orbax.

    <folder>/<step>/            files, about.json and manifest.json
    <folder>/<step>.bad-<n>/    set aside at a start: kept for a look, never used

Orbax's AsyncCheckpointer writes; which steps exist, which count and which go is decided here. (Its CheckpointManager would ask JAX's
preemption service for a step in its finalizing thread, out of lockstep with the loop.) The manifest is the last file written; locally
one rename follows, which commits them together, on gs:// the manifest itself is the commit.

A storage that does not answer is asked again inside the saving threads: by TensorStore for many minutes (32 times, 1 to 32 s apart),
by gcsfs for half a minute. What fails after that, or fails for good as on a full disk, is raised at the next step: the run ends with
the last good checkpoint in place, instead of computing on without any.
"""

import errno
import functools
import os
import re
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from cluster.errors import PodlaunchError
from launcher.curve import Meaning, check_same_curve
from launcher.training.manifest import read_about, seal, verify
from launcher.training.processes import first_text, from_main, is_main
from launcher.training.reporter import Reporter
from launcher.training.retention import Retention
from launcher.training.saving import SaveCost
from launcher.training.state import TrainState
from launcher.training.storage import is_damage, open_storage

FOLDER = "checkpoints"
SAVE_LIMIT_S = 1800
"""How long one save may take in the background before it counts as failed."""
CAUSE_LIMIT = 300
"""Characters of an error that is passed on: TensorStore's hold whole specifications."""
LEAST_SLICE_BYTES = 1 << 25
"""What every replica of an array would write by itself must be so much at least. To cut a slice for each device of each shape is one
compilation, all within the first save (measured: 2.9 s of 90 s with the default local model), and saves little for small arrays.
"""
_STEP = re.compile(r"\d+")
_NOTHING, _ALL_BAD = -1, -2
_UNREADABLE = "unreadable: "


class CheckpointError(PodlaunchError):
    """There are checkpoints, and none of them can be used; or one does not fit the configuration; or a save failed."""


class Checkpoints:
    """The checkpoints of one run. Every method but `poll` is collective: all processes call it at the same step."""

    def __init__(
        self,
        folder: str | Path,
        retention: Retention,
        reporter: Reporter,
        *,
        meaning: Meaning,
        allow: Collection[str] = (),
        may_publish: Callable[[], None] = lambda: None,
        save_limit_s: int = SAVE_LIMIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`folder` is a local path or gs://. `meaning` goes into every checkpoint, and a restore compares it, except what `allow` names.
        `may_publish` is called on process 0 before a checkpoint is committed, and raises where it must not be.

        Raises StorageError when the place is of no known kind.
        """
        self._storage = open_storage(str(folder))
        self._retention, self._reporter, self._clock = retention, reporter, clock
        self._meaning, self._allow, self._may_publish = meaning, allow, may_publish
        _write_small_arrays_whole()
        self._saver = ocp.AsyncCheckpointer(
            ocp.StandardCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(timeout_secs=save_limit_s, post_finalization_callback=self._seal),
            checkpoint_metadata_store=_NoStepMetadata(),
            # Nothing exists at the step that is saved: `restore` has looked. Asking again would hold training up for a round trip.
            file_options=ocp.options.FileOptions(skip_sync_file_validations=True),
        )
        self._finisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future[SaveCost]] | None = None
        self._under_way: int | None = None
        self._newest: int | None = None
        self._cost: SaveCost | None = None

    @property
    def newest(self) -> int | None:
        """The step restored or saved last."""
        return self._newest

    @property
    def cost(self) -> SaveCost | None:
        """Of the last save that is done; None before the first."""
        return self._cost

    def restore(self, target: TrainState) -> TrainState | None:
        """The newest good checkpoint on the target's mesh, whatever mesh it was saved from; None when there is none at all.

        `target` has ShapeDtypeStruct leaves with shardings. Bad ones are set aside and reported. Raises CheckpointError when none of
        those present is good, when the good one was made with another model, or when the storage does not answer; ConfigError when it
        was made with other settings (launcher/curve.py) that were not allowed.
        """
        try:
            step = self._find()
        except self._storage.errors as error:
            raise self._unreadable(error) from error
        if step == _ALL_BAD:
            raise CheckpointError(
                f"no usable checkpoint in {self._storage.url}: all were set aside as *.bad-*; training does not start over by itself: "
                "repair one and rename it to its step, or start a run with another name"
            )
        if step == _NOTHING:
            return None
        check_same_curve(read_about(self._storage, str(step)), self._meaning, self._allow, f"checkpoint {step}")
        self._check_fits(step, target)
        state = self._saver.restore(self._path(step), args=ocp.args.StandardRestore(target))
        self._newest = step
        self._reporter.emit("restored", step=step)
        return TrainState(*state)

    def save(self, step: int, state: TrainState) -> None:
        """Start saving; returns when the state may be changed again. Waits for the one before. Raises CheckpointError if either failed."""
        if step in (self._newest, self._under_way):
            return
        began = self._clock()
        self.wait()
        self._under_way = step
        try:
            self._saver.save(self._path(step), args=ocp.args.StandardSave(state))
        except self._storage.errors as error:
            raise self._failed(step, error) from error
        blocked = self._clock() - began
        self._saving = step, self._finisher.submit(self._finish, began, blocked)

    def poll(self) -> None:
        """Look after the save in the background; call it at every step. Raises CheckpointError when it failed."""
        if self._saving is None or not self._saving[1].done():
            return
        (step, future), self._saving = self._saving, None
        if (error := future.exception()) is not None:
            raise self._failed(step, error) from error
        self._newest, self._cost = step, future.result()
        if is_main():
            took = {"blocking_s": round(self._cost.blocking_s, 4), "write_s": round(self._cost.write_s, 4)}
            self._reporter.emit("checkpoint", step=step, **took)

    def wait(self) -> None:
        """Return when nothing is being saved. Raises CheckpointError when the save failed."""
        if self._saving is not None:
            self._saving[1].exception()
        self.poll()

    def close(self) -> None:
        """Finish what is under way and free the threads. May be called again."""
        try:
            self.wait()
        finally:
            self._finisher.shutdown()
            self._saver.close()

    def _finish(self, began: float, blocked: float) -> SaveCost:
        """In a thread of its own: wait for the commit, then make room."""
        self._saver.wait_until_finished()
        cost = SaveCost(blocked, self._clock() - began)
        if is_main():
            for old in self._retention.superfluous(self._steps()):  # only now: at every moment a sealed checkpoint exists
                self._storage.remove(str(old))
        return cost

    def _seal(self) -> None:
        """Orbax calls this on process 0 between the last written byte and its commit, so that no crash can leave a committed checkpoint
        without its manifest.
        """
        assert self._under_way is not None
        self._may_publish()
        name = self._saver.get_temporary_path(self._path(self._under_way)).get().name
        seal(self._storage, name, self._under_way, self._meaning)

    def _failed(self, step: int, error: BaseException) -> CheckpointError:
        good = "there is none yet" if self._newest is None else f"the last good one is {self._newest}"
        cause = "No space left on device" if _is_full(error) else " ".join(str(error).split())[:CAUSE_LIMIT] or type(error).__name__
        return CheckpointError(
            f"checkpoint {step} could not be written to {self._storage.url} ({good}): {cause}; "
            "free space or repair the storage, then go on with run.resume=true"
        )

    def _check_fits(self, step: int, target: TrainState) -> None:
        """Orbax itself cuts or fills arrays of another shape, or leaves reads hanging: compare before it starts."""
        stored = jax.tree.map(lambda x: tuple(x.shape), self._saver.handler.metadata(self._path(step)).tree["params"])
        wanted = jax.tree.map(lambda x: tuple(x.shape), target.params)
        if stored != wanted:
            raise CheckpointError(
                f"{self._path(step)} does not fit this model: its weights have other names or shapes; "
                "use the model.variant it was made with, or start a run with another name"
            )

    def _find(self) -> int:
        """The newest good step, agreed on by all processes, after setting aside those that are bad."""
        candidates = self._tidy() if is_main() else []
        while (step := from_main(candidates.pop() if candidates else _NOTHING)) != _NOTHING:
            reason = self._verdict(step)
            if reason is None:
                return step
            if is_main():
                self._set_aside(step, reason)
        return from_main(_ALL_BAD if is_main() and any(".bad-" in name for name in self._storage.names()) else _NOTHING)

    def _verdict(self, step: int) -> str | None:
        """None when all processes found their share of the files good, else the first one's reason."""
        reason: str | None = None
        try:
            if not self._storage.lists_checksums:
                reason = verify(self._storage, str(step), jax.process_index(), jax.process_count())
            elif is_main():
                reason = verify(self._storage, str(step))
            if is_main() and reason is None:
                self._storage.finish(str(step))
        except self._storage.errors as error:
            reason = f"it cannot be read: {error}" if is_damage(error) else f"{_UNREADABLE}{error}"
        reason = first_text(reason)
        if reason is not None and reason.startswith(_UNREADABLE):  # told to all, since each of them has to stop
            raise self._unreadable(reason.removeprefix(_UNREADABLE))
        return reason

    def _tidy(self) -> list[int]:
        """Clean up after earlier attempts; the steps that are there, oldest first."""
        self._storage.make()
        for name in self._storage.leftovers():
            self._storage.remove(name)
        return self._steps()

    def _set_aside(self, step: int, reason: str) -> None:
        taken = set(self._storage.names())
        number = next(n for n in range(1, len(taken) + 2) if f"{step}.bad-{n}" not in taken)
        self._storage.rename(str(step), f"{step}.bad-{number}")
        self._reporter.emit("checkpoint_set_aside", step=step, reason=reason)

    def _unreadable(self, error: BaseException | str) -> CheckpointError:
        cause = " ".join(str(error).split()) or type(error).__name__
        return CheckpointError(
            f"the checkpoints in {self._storage.url} cannot be read: {cause}; nothing was changed, try again when they can"
        )

    def _steps(self) -> list[int]:
        return sorted(int(name) for name in self._storage.names() if _STEP.fullmatch(name))

    def _path(self, step: int) -> epath.Path:
        return epath.Path(self._storage.url) / str(step)


def _is_full(error: BaseException) -> bool:
    """Whether the disk is full; TensorStore calls that RESOURCE_EXHAUSTED, which elsewhere means that memory is."""
    return os.strerror(errno.ENOSPC) in str(error) or os.strerror(errno.EDQUOT) in str(error)


@functools.cache  # Orbax's registry is one a process
def _write_small_arrays_whole() -> None:
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=LEAST_SLICE_BYTES)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


class _NoStepMetadata(ocp.metadata.MetadataStore):  # type: ignore[misc]  # Orbax publishes no types
    """Keeps Orbax from writing the times of saves into a file that it changes after the manifest is made; nothing reads it."""

    def is_blocking_writer(self) -> bool:
        return True

    def write(self, file_path: Any, metadata: Any) -> None: ...

    def read(self, file_path: Any) -> None: ...

    def update(self, file_path: Any, **kwargs: Any) -> None: ...

    def wait_until_finished(self) -> None: ...

    def close(self) -> None: ...
