"""Traces of the devices while a run trains, on request: jax.profiler, begun and ended at step boundaries.

A request is a line of JSON in a pipe that the runner holds: {"id": .., "steps": ..}. What comes of it is
<output>/profiles/plugins/profile/<id>/host-<i>.xplane.pb, which XProf and TensorBoard read. Every process answers by an event:

    profile          {id, first, last, bytes}     the steps that were traced
    profile_failed   {id, error}                  training goes on all the same
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from launcher.process_variables import REQUEST_FD
from launcher.profiles import ProfileRequest, trace_name
from launcher.training.reporter import Reporter


@dataclass
class _Trace:
    request: ProfileRequest
    first: int
    folder: Path
    """Where JAX writes; nobody else looks there."""


class Profiler:
    """Of one training process. All calls come from the thread that trains."""

    def __init__(
        self,
        fd: int | None,
        output: Path,
        host: int,
        reporter: Reporter,
        *,
        start: Callable[[str], None] | None = None,
        stop: Callable[[], None] = jax.profiler.stop_trace,
    ) -> None:
        """`fd`: where requests come from; None: from nowhere. `host`: the process's index. `start` and `stop`: JAX's."""
        self._fd, self._output, self._host, self._reporter = fd, output, host, reporter
        self._start, self._stop = start or _start_trace, stop
        self._read = b""
        self._trace: _Trace | None = None
        self._step = 0
        if fd is not None:
            os.set_blocking(fd, False)

    def before(self, step: int, wait: Callable[[], Any]) -> None:
        """Call it before every step. `wait` returns when the devices have done all steps before: a trace holds whole steps."""
        if self._trace is not None and step - self._trace.first >= self._trace.request.steps:
            wait()
            self.finish()
        self._step = step
        if (request := self._next_request()) is not None and self._trace is None:
            wait()
            self._begin(request, step)

    def finish(self) -> None:
        """End a trace that is under way. Nothing when there is none."""
        if self._trace is None:
            return
        trace, self._trace = self._trace, None
        request = trace.request
        try:
            self._stop()
            size = self._keep(trace)
        except (RuntimeError, OSError, ValueError) as error:
            self._fail(request, error)
        else:
            self._reporter.emit("profile", id=request.id, first=trace.first, last=self._step, bytes=size)
        finally:
            shutil.rmtree(trace.folder, ignore_errors=True)

    def _begin(self, request: ProfileRequest, step: int) -> None:
        try:
            folder = Path(tempfile.mkdtemp(prefix=".profile-", dir=self._output))
        except OSError as error:
            self._fail(request, error)
            return
        try:
            self._start(str(folder))
        except (RuntimeError, OSError) as error:  # such as a trace that somebody else began
            shutil.rmtree(folder, ignore_errors=True)
            self._fail(request, error)
            return
        self._trace = _Trace(request, step, folder)

    def _keep(self, trace: _Trace) -> int:
        """Put it where it is looked for, at once; its size in bytes. Raises ValueError when there is not exactly one."""
        (made,) = trace.folder.rglob("*.xplane.pb")
        size = made.stat().st_size
        place = self._output / trace_name(trace.request.id, self._host)
        place.parent.mkdir(parents=True, exist_ok=True)
        made.replace(place)
        return size

    def _fail(self, request: ProfileRequest, error: Exception) -> None:
        self._reporter.emit("profile_failed", id=request.id, error=f"{type(error).__name__}: {' '.join(str(error).split())}")

    def _next_request(self) -> ProfileRequest | None:
        if self._fd is None:
            return None
        with contextlib.suppress(BlockingIOError):
            self._read += os.read(self._fd, 4096)
        line, found, rest = self._read.partition(b"\n")
        if not found:
            return None
        self._read = rest
        return ProfileRequest(**json.loads(line))


def profiler_of(output: Path, reporter: Reporter) -> Profiler:
    """This process's, which hears its runner where it has one."""
    given = os.environ.get(REQUEST_FD)
    return Profiler(int(given) if given else None, output, jax.process_index(), reporter)


def _start_trace(folder: str) -> None:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of every Python function: most of the trace, and slow
    jax.profiler.start_trace(folder, profiler_options=options)
