"""Checkpoints: saved in the background, sealed with a manifest, verified before use. The one module that knows Orbax.

    <output>/checkpoints/<step>/            files and their manifest.json, committed together by one rename
    <output>/checkpoints/<step>.bad-<n>/    set aside at a start: kept for a look, never used

Orbax's AsyncCheckpointer writes; which steps exist, which count and which go is decided here. (Its CheckpointManager would ask JAX's
preemption service for a step in its finalizing thread, out of lockstep with the loop.)
"""

import re
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from cluster.errors import PodlaunchError
from launcher.training.manifest import verify, write_manifest
from launcher.training.processes import from_main, is_main
from launcher.training.reporter import Reporter
from launcher.training.state import Blueprint, TrainState

FOLDER = "checkpoints"
_STEP = re.compile(r"\d+")
_PARTIAL = "*.orbax-checkpoint-tmp*"
"""How Orbax names the folder it writes before its commit."""
_NOTHING, _ALL_BAD = -1, -2


class CheckpointError(PodlaunchError):
    """There are checkpoints, and none of them can be used; or one does not fit the configuration."""


class Checkpoints:
    """The checkpoints of one run. Every method but `poll` is collective: all processes call it at the same step."""

    def __init__(self, output: Path, keep: int, reporter: Reporter) -> None:
        self._folder = output.absolute() / FOLDER
        self._keep, self._reporter = keep, reporter
        options = ocp.options.AsyncOptions(post_finalization_callback=self._seal)
        self._saver = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler(), async_options=options)
        self._saving: int | None = None
        self._newest: int | None = None

    @property
    def newest(self) -> int | None:
        """The step restored or saved last."""
        return self._newest

    def restore(self, blueprint: Blueprint) -> TrainState | None:
        """The newest good checkpoint on the blueprint's mesh, whatever mesh it was saved from; None when there is none at all.

        Bad ones are set aside and reported. Raises CheckpointError when none of those present is good, or when the good one was made
        with another model.
        """
        step = from_main(self._choose() if is_main() else _NOTHING)
        if step == _ALL_BAD:
            raise CheckpointError(
                f"no usable checkpoint in {self._folder}: all were set aside as *.bad-*; training does not start over by itself: "
                "repair one, or start a run with another name"
            )
        if step == _NOTHING:
            return None
        self._check_fits(step, blueprint)
        state = self._saver.restore(self._path(step), args=ocp.args.StandardRestore(blueprint.abstract))
        self._newest = step
        self._reporter.emit("restored", step=step)
        return TrainState(*state)

    def save(self, step: int, state: TrainState) -> None:
        """Start saving; returns when the state may be changed again. Waits for the save before it. Raises its error, if it failed."""
        if step == self._newest:
            return
        self.wait()
        self._saving = step
        self._saver.save(self._path(step), args=ocp.args.StandardSave(state))
        self._newest = step

    def poll(self) -> None:
        """Look after the save in the background; call it at every step. Raises the error of a failed save."""
        self._saver.check_for_errors()
        if is_main() and self._saving is not None and self._path(self._saving).exists():
            step, self._saving = self._saving, None
            self._reporter.emit("checkpoint", step=step)
            for old in self._steps()[: -self._keep]:  # only now: at every moment a sealed checkpoint exists
                shutil.rmtree(self._path(old))

    def wait(self) -> None:
        """Return when nothing is being saved. Raises the error of a failed save."""
        self._saver.wait_until_finished()
        self.poll()

    def close(self) -> None:
        """Finish what is under way and free the threads. May be called again."""
        try:
            self.wait()
        finally:
            self._saver.close()

    def _check_fits(self, step: int, blueprint: Blueprint) -> None:
        """Orbax itself cuts or fills arrays of another shape, or leaves reads hanging: compare before it starts."""
        stored = jax.tree.map(lambda x: tuple(x.shape), self._saver.metadata(self._path(step)).item_metadata.tree["params"])
        wanted = jax.tree.map(lambda x: tuple(x.shape), blueprint.abstract.params)
        if stored != wanted:
            raise CheckpointError(
                f"{self._path(step)} does not fit this model: its weights have other names or shapes; "
                "use the model.variant it was made with, or start a run with another name"
            )

    def _seal(self) -> None:
        """Orbax calls this on process 0 between the last written byte and the rename that commits, so that no crash can leave a
        committed checkpoint without its manifest.
        """
        (partial,) = self._folder.glob(f"{self._saving}.{_PARTIAL[2:]}")
        write_manifest(partial)

    def _choose(self) -> int:
        """Clean up after earlier attempts and find the newest good step; process 0 only."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for partial in self._folder.glob(_PARTIAL):
            shutil.rmtree(partial)
        steps = self._steps()
        for step in reversed(steps):
            reason = verify(self._path(step))
            if reason is None:
                return step
            self._set_aside(step, reason)
        known_bad = any(self._folder.glob("*.bad-*"))
        return _ALL_BAD if steps or known_bad else _NOTHING

    def _set_aside(self, step: int, reason: str) -> None:
        taken = {path.name for path in self._folder.iterdir()}
        number = next(n for n in range(1, len(taken) + 2) if f"{step}.bad-{n}" not in taken)
        self._path(step).rename(self._folder / f"{step}.bad-{number}")
        self._reporter.emit("checkpoint_set_aside", step=step, reason=reason)

    def _steps(self) -> list[int]:
        return sorted(int(path.name) for path in self._folder.iterdir() if _STEP.fullmatch(path.name))

    def _path(self, step: int) -> Path:
        return self._folder / str(step)
