"""`python -m launcher.training.child RUN_DIR --attempt N`: one process of a run, started by the run's supervisor on a host.

    PODLAUNCH_PARENT_PID            whose child this is; it dies with its parent
    PODLAUNCH_EVENT_FD              where events go (launcher/training/reporter.py)
    PODLAUNCH_COORDINATOR           host:port of process 0, for jax.distributed
    PODLAUNCH_NUM_PROCESSES, PODLAUNCH_PROCESS_ID
    PODLAUNCH_COMPILATION_CACHE     folder of JAX's persistent compilation cache
    PODLAUNCH_REQUEST_FD            where requests for profiles come from (launcher/training/profiling.py)
    PODLAUNCH_ORDERS_FD             of a spare: where its orders come from (launcher/training/spare.py)
    PODLAUNCH_USER_CODE             folder of the user's own modules, last on the path: they can shadow nothing of ours
    PODLAUNCH_PEAK_FLOPS            peak FLOP/s of all chips of the run together; MFU is reported when it is set, on TPUs only

It trains what model, data and trainer of the run's config say, or runs the program of job=script, which the runner tells besides:

    PODLAUNCH_RUN_DIR, PODLAUNCH_ATTEMPT, PODLAUNCH_CHECKPOINT_DIR
    PODLAUNCH_STOP_FD               readable once the process was asked to end (launcher/training/script.py)
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID

Exit codes: 0 done; 1 failed, with an "error" event and a traceback on stderr; 2 a wrong command line; 143 stopped by SIGTERM with the
state saved. A program that fails with a code of its own keeps it.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from launcher.entrypoint import Entrypoint
from launcher.process_variables import ORDERS_FD, PARENT_PID
from launcher.training.compilation_cache import keep_in, keep_on_every_host
from launcher.training.coordinator import await_coordinator
from launcher.training.program import ProgramFailed, program_of, run_program
from launcher.training.reporter import Reporter, reporter_from_environment
from launcher.training.spare import take_orders

EXIT_DONE, EXIT_FAILED, EXIT_STOPPED = 0, 1, 128 + signal.SIGTERM
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_PR_SET_PTRACER, _PR_SET_PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)


@dataclass(frozen=True)
class Gang:
    """This process's place among the processes of the run."""

    coordinator: str | None
    processes: int
    process: int

    @classmethod
    def from_environment(cls) -> "Gang":
        env = os.environ
        return cls(
            env.get("PODLAUNCH_COORDINATOR"), int(env.get("PODLAUNCH_NUM_PROCESSES", "1")), int(env.get("PODLAUNCH_PROCESS_ID", "0"))
        )


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Never returns: ends with `os._exit`, since JAX's exit handlers wait for peers that may be dead."""
    die_with_parent()
    may_be_looked_at()
    parser = argparse.ArgumentParser(prog="python -m launcher.training.child")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--attempt", type=int, default=0)
    parser.add_argument("--run", help="the run directory itself, where RUN_DIR is a host's copy of one on gs://")
    parser.add_argument("--checkpoints", help="where they are, a local path or gs://; by default in RUN_DIR")
    args = parser.parse_args(argv)
    if ORDERS_FD in os.environ:
        args = parser.parse_args(take_orders(args.run_dir))
    reporter = reporter_from_environment()
    if program := program_of(args.run_dir):
        run_users(program, args.run_dir, reporter)
    signal.signal(signal.SIGTERM, _stop_at_once)  # until training has a state worth saving
    code, opened = EXIT_FAILED, contextlib.ExitStack()
    try:
        try:
            code = run(args.run_dir, args.attempt, reporter, opened, args.checkpoints, args.run)
        except Exception as error:  # noqa: BLE001  # the outermost loop: whatever happened is told to the log and to the supervisor
            tell(error, reporter)
        opened.close()  # after the telling: it may wait for peers that are gone
    finally:
        leave(code)


def run_users(program: Entrypoint, run_dir: Path, reporter: Reporter) -> NoReturn:
    """Ends as the program does; when that failed at once, without JAX's exit handlers, which wait for peers that may be dead."""
    work = run_dir / "work" / f"host-{Gang.from_environment().process}"
    try:
        run_program(program, Path(os.environ["PODLAUNCH_USER_CODE"]), work, reporter)
    except ProgramFailed as failed:
        reporter.emit("error", error=str(failed))
        leave(failed.code)
    sys.exit(EXIT_DONE)


def leave(code: int) -> NoReturn:
    """End at once, whatever becomes of the last words: the disk of the log may be full."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def run(
    run_dir: Path, attempt: int, reporter: Reporter, opened: contextlib.ExitStack, checkpoints: str | None, url: str | None = None
) -> int:
    """Train what RUN_DIR/config.yaml says; the exit code. Raises whatever goes wrong, and then leaves the job in `opened`."""
    reporter.emit("phase", phase="connecting")
    if user_code := os.environ.get("PODLAUNCH_USER_CODE"):
        sys.path.append(user_code)
    gang = Gang.from_environment()
    connect(gang)
    from launcher.claims import Claims
    from launcher.config import LaunchConfig
    from launcher.run_files import open_files
    from launcher.training.job import Preempted, TrainingJob

    config = LaunchConfig.from_yaml(run_dir / "config.yaml")
    claims = Claims(open_files(url or run_dir))
    job = opened.enter_context(
        TrainingJob(
            config.training_on_slices,
            run_dir,
            reporter,
            attempt=attempt,
            peak_flops=peak_flops(),
            allow=config.run.allow,
            may_publish=lambda: claims.check(attempt),
            checkpoints=checkpoints,
            name=(url or str(run_dir)).rpartition("/")[2],
        )
    )
    code = EXIT_DONE
    try:
        job.prepare()
        job.execute()
    except Preempted as stopped:
        print(stopped, file=sys.stderr)
        code = EXIT_STOPPED
    opened.close()
    disconnect(gang)
    return code


def peak_flops() -> float | None:
    """The peak that the slice's type promises, where its chips are what computes; None on other devices, whose peak is unknown."""
    import jax

    peak = os.environ.get("PODLAUNCH_PEAK_FLOPS")
    return float(peak) if peak and jax.default_backend() == "tpu" else None


def tell(error: Exception, reporter: Reporter) -> None:
    reporter.emit("error", error=one_line(error))
    with contextlib.suppress(OSError):  # the disk of the log may be what is full; what counts is told
        traceback.print_exception(error)


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent dies, so that no training outlives its supervisor and keeps the chips."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    expected = os.environ.get(PARENT_PID)
    if expected and os.getppid() != int(expected):  # it died before the line above
        os._exit(EXIT_FAILED)


def may_be_looked_at() -> None:
    """Let the runner's py-spy read this process's stacks when it hangs: where Yama restricts that, only ancestors may without root."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)


def connect(gang: Gang) -> None:
    """Configure JAX and join the other processes of the run."""
    import jax

    cache = os.environ.get("PODLAUNCH_COMPILATION_CACHE")
    if cache:
        keep_on_every_host()
        keep_in(cache)
    if gang.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # type: ignore[no-untyped-call]
        if gang.process > 0 and gang.coordinator is not None:
            await_coordinator(gang.coordinator)
        # Process 0 serves at its own address only: JAX would take all interfaces, and asks nobody who they are.
        jax.distributed.initialize(gang.coordinator, gang.processes, gang.process, coordinator_bind_address=gang.coordinator)


def disconnect(gang: Gang) -> None:
    """Leave together: process 0 serves the others until all have come here."""
    import jax

    if gang.processes > 1:
        jax.distributed.shutdown()  # type: ignore[no-untyped-call]


def one_line(error: BaseException) -> str:
    """An error as one line; those written for the user keep their words."""
    from cluster.errors import PodlaunchError

    text = " ".join(str(error).split())
    return text if isinstance(error, PodlaunchError) else f"{type(error).__name__}: {text}"


def _stop_at_once(_number: int, _frame: FrameType | None) -> None:
    os._exit(EXIT_STOPPED)


if __name__ == "__main__":
    main()
