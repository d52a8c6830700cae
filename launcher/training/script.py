"""What a training script may say to its launcher and ask it: a few functions, each of which also works in a plain `python train.py`.

    from launcher.training import script

    script.initialize()                              # jax.distributed, when the run has several processes
    manager = ocp.CheckpointManager(script.checkpoint_dir(), ...)
    for step in range(first, steps + 1):
        ...
        script.report(step, steps, loss=loss)
        if script.preempted():                       # the same answer on every process
            manager.save(step, ...); break

Needs neither JAX nor Ray to be imported, and imports nothing else of ours.
"""

import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, cast

from launcher.process_variables import STOP_FD
from launcher.training.coordinator import await_coordinator
from launcher.training.reporter import StepThrottle, reporter_from_environment
from launcher.training.rows import Rows

RUN_DIR_VARIABLE = "PODLAUNCH_RUN_DIR"
AGREEMENT_S = 60.0
"""So long a process waits for the others to say at which call of `preempted` they are: longer than what a notice leaves."""


def initialize() -> None:
    """`jax.distributed.initialize` with the processes of the run; nothing where there is one process only.

    A plain `jax.distributed.initialize()` does as well on the cluster, but fails on a laptop.
    """
    processes = int(os.environ.get("JAX_NUM_PROCESSES", "1"))
    if processes > 1:
        import jax

        if _process() > 0:
            await_coordinator(os.environ["JAX_COORDINATOR_ADDRESS"])
        jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], processes, _process())


def checkpoint_dir() -> Path:
    """Where checkpoints belong that the run shall find again: in its run directory; elsewhere ./checkpoints. Made when it is not there.

    For a run on gs:// an `etils.epath.Path`, which has the same methods and which Orbax takes as well.
    """
    place = os.environ.get("PODLAUNCH_CHECKPOINT_DIR") or "checkpoints"
    if "://" in place:
        from etils import epath  # comes with Orbax

        return cast(Path, epath.Path(place))
    path = Path(place).absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


def report(step: int, total_steps: int | None = None, **metrics: Any) -> None:
    """Tell that `step` is done, and of how many. Every process may call it.

    Process 0 also writes `metrics` (numbers, or arrays that hold one) into the run's metrics.jsonl; `loss`, `tokens_per_second` and `mfu`
    are shown in the run's status. To read a number waits for the device: give metrics for the steps that are to be logged only.
    A number that is not finite is written as null. Without a launcher they are printed.
    """
    _progress.report(step, total_steps, metrics)


def preempted() -> bool:
    """Whether to save and end now: the cloud is about to take hosts away, or somebody stops the run. Once true it stays so.

    Under jax.distributed with several processes all of them get the same answer at the same call: call it on every process equally often,
    for example once a step. Without jax.distributed it is what this host was told. Without a launcher it is whether SIGTERM came.
    """
    return _stop.asked()


def _process() -> int:
    return int(os.environ.get("JAX_PROCESS_ID", "0"))


class _Progress:
    """What `report` keeps between calls."""

    def __init__(self) -> None:
        self._reporter = reporter_from_environment()
        self._throttle: StepThrottle | None = None
        self._run_dir = os.environ.get(RUN_DIR_VARIABLE)
        self._first = _process() == 0
        self._rows: Rows | None = None

    def report(self, step: int, total_steps: int | None, metrics: dict[str, Any]) -> None:
        if self._throttle is None:
            self._reporter.emit("phase", phase="training")
            self._throttle = StepThrottle(total_steps or 0)
            self._rows = Rows(Path(self._run_dir, "metrics.jsonl")) if self._run_dir and self._first else None
        values = {name: _number(value) for name, value in metrics.items()} if self._first else {}
        if self._rows and values:
            self._rows.write({"step": step, "attempt": int(os.environ.get("PODLAUNCH_ATTEMPT", "0")), "time": time.time(), **values})
        elif values and not self._run_dir:
            print(" ".join([f"step {step}/{total_steps or '?'}", *(f" {name} {value}" for name, value in values.items())]), flush=True)
        if self._throttle.passes(step, bool(values) or step == total_steps):
            shown = {name: values.get(name) for name in ("loss", "tokens_per_second", "mfu")}
            self._reporter.emit("step", step=step, total_steps=total_steps or 0, **shown)


def _number(value: Any) -> float | int | None:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


class _Stop:
    """Has this process been told to end?

    The runner tells it by a byte in a pipe, which stays there for everybody who looks, and by SIGTERM, for programs and libraries that
    listen to that alone; after `jax.distributed.initialize` it is JAX's own service that takes the signal, and no handler sees it.
    """

    def __init__(self) -> None:
        given = os.environ.get(STOP_FD)
        self._pipe = int(given) if given else None
        self._signalled = False
        self._listens = False
        self._agreement: Callable[[], bool] | None = None

    def asked(self) -> bool:
        client = _distributed_client()
        if client is None:
            self._listen()
            return self._signalled or self._told(0.0)
        if self._agreement is None:
            self._agreement = _JaxAgreement().reached if self._pipe is None else Agreement(client, lambda: self._told(None)).reached
        return self._agreement()

    def _told(self, timeout: float | None) -> bool:
        """Whether the byte is there; waits up to `timeout` seconds for it, None: until it is."""
        return self._pipe is not None and bool(select.select([self._pipe], [], [], timeout)[0])

    def _listen(self) -> None:
        """SIGTERM is no longer the end, unless the program has plans of its own for it."""
        if not self._listens and threading.current_thread() is threading.main_thread():
            self._listens = True
            if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signalled = True


class Agreement:
    """All processes find at the same call that they were told to end: the one after the furthest that any of them has made.

    `client` is JAX's, of its key-value store and barriers. `wait` returns when this process has been told, which happens to each of them
    at a moment of its own. While they compare their numbers none makes another call.
    """

    def __init__(self, client: Any, wait: Callable[[], object]) -> None:
        self._client = client
        self._wait = wait
        self._lock = threading.Lock()
        self._calls = 0
        self._last: int | None = None
        threading.Thread(target=self._agree, name="agreement", daemon=True).start()

    def reached(self) -> bool:
        with self._lock:
            self._calls += 1
            return self._last is not None and self._calls >= self._last

    def _agree(self) -> None:
        self._wait()
        with self._lock:
            self._last = self._calls + 1  # if the others do not answer, they are gone or do not ask
            try:
                self._client.key_value_set(f"podlaunch/calls/{_process()}", str(self._calls))
                self._client.wait_at_barrier("podlaunch/calls", int(AGREEMENT_S * 1000))
                calls = self._client.key_value_dir_get("podlaunch/calls")
            except RuntimeError as error:
                print(f"told to end, but the other processes did not say where they are: {error}", file=sys.stderr, flush=True)
                return
            self._last = max(int(count) for _, count in calls) + 1


class _JaxAgreement:
    """The same where nobody but the cloud tells, by SIGTERM: JAX's service agrees on one call and says so at that one only."""

    def __init__(self) -> None:
        self._calls = 0
        self._reached = False

    def reached(self) -> bool:
        from jax.experimental import multihost_utils

        self._calls += 1
        self._reached = self._reached or bool(multihost_utils.reached_preemption_sync_point(self._calls))
        return self._reached


def _distributed_client() -> Any:
    """JAX's client of its distributed service; None when the program has none, or is the only process."""
    module = sys.modules.get("jax._src.distributed")  # JAX publishes no other way to it; Orbax takes the same
    state = module and module.global_state
    return state.client if state and state.num_processes > 1 else None


_progress = _Progress()
_stop = _Stop()
