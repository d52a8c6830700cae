"""From the command line to a finished run; shared by launch.py, the console script `podlaunch` and `tpu train run`."""

import dataclasses
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from omegaconf import DictConfig
from rich.console import Console

from cluster import clusters
from cluster.clusters import Cluster
from cluster.errors import ClusterError, PodlaunchError
from cluster.logs import set_up_logging
from cluster.ray_http import HeadRefused
from cluster.state import logs_dir
from launcher import jobs
from launcher.code import pack_data
from launcher.compose import CONFIG_NAME, compose_config, config_dir, load, quote_entrypoint, register_schema
from launcher.config import LaunchConfig
from launcher.environment import read_dotenv
from launcher.follow import EXIT_INTERRUPTED, follow
from launcher.plan import describe
from launcher.preflight import prepare_run
from launcher.run_files import is_object
from launcher.runs import FINAL, RunDirectory, RunState, RunStatus

logger = logging.getLogger(__name__)

ALIVE_CHECK_S = 3.0
VERBOSE = ("-v", "--verbose")


def main() -> None:
    """The entry point of launch.py and of `podlaunch`. Exits 0 when the run succeeded, 100 when it failed, 2 for a wrong setting."""
    arguments = [word for word in sys.argv[1:] if word not in VERBOSE]
    verbose = len(arguments) < len(sys.argv) - 1
    sys.exit(guarded(lambda: _run_command_line(arguments), "launch", verbose=verbose))


def guarded(command: Callable[[], int], component: str, *, verbose: bool = False) -> int:
    """Run a command; whatever goes wrong is one line on stderr, and the traceback is in the component's log."""
    read_dotenv()
    errors = Console(stderr=True)
    try:
        set_up_logging(component, terminal=logging.INFO if verbose else logging.WARNING)
        return command()
    except PodlaunchError as error:
        logger.info("refused: %s", error, exc_info=True)
        for line in str(error).splitlines():
            errors.print(f"error: {line}", highlight=False, soft_wrap=True, markup=False)
        return error.exit_code
    except KeyboardInterrupt:
        errors.print("interrupted", highlight=False)
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001  # the outermost loop: an error that nobody foresaw
        logger.info("%s", traceback.format_exc())
        log = logs_dir() / f"{component}.log"
        errors.print(f"error: {type(error).__name__}: {error} (the traceback is in {log})", highlight=False, soft_wrap=True, markup=False)
        return 1


def launch(config: LaunchConfig, console: Console, *, detach: bool = False) -> int:
    """Bring the cluster up where needed, submit the run, follow it to its end. Returns the exit code.

    Raises ConfigError before anything is started, ClusterError when the cluster cannot be brought up.
    """
    config = config.with_environment(os.environ).with_absolute_paths()
    on_gs = is_object(config.run.root or "")
    reached = clusters.reach_cloud(config.cluster) if on_gs else config.cluster
    run, code = prepare_run(config, reached.storage_endpoint)
    data = pack_data(config.data) if on_gs and config.data is not None else None
    clusters.check_name(config.cluster.name, bare=False)
    running = clusters.running(config.cluster)
    if running is not None:
        clusters.check_fits(running, config.slices)
    for title, text in describe(config, run):
        console.print(f"{title:<12}{text}", highlight=False, soft_wrap=True, markup=False)
    console.print()
    cluster = clusters.up(config.cluster, lambda text: console.print(text, highlight=False))
    if data is not None:
        run.write_data(data)
    submit(cluster, run, config, code)
    if detach:
        console.print(f"submitted; follow it with: tpu train attach {run.url}", highlight=False, soft_wrap=True)
        return 0
    return follow(run, console, check=supervisor_watch(cluster, run))


def submit(cluster: Cluster, run: RunDirectory, config: LaunchConfig, code: bytes) -> str:
    """Write the run directory and start the run's supervisor. Returns the job's id."""
    before = run.status()
    attempt = 0 if before is None else before.attempt + 1
    run.create(config)
    run.clear_stop_request()
    run.write_code(code)
    fresh = RunStatus(run_id=run.run_id, cluster=cluster.name, state=RunState.QUEUED, started_at=time.time(), attempt=attempt)
    if before is not None:
        fresh = dataclasses.replace(
            fresh,
            step=before.step,
            recoveries=before.recoveries,
            held_out_before=before.held_out_before,
            checkpoint=before.checkpoint,
            cost_usd=before.cost_usd,
        )
    run.write_status(dataclasses.replace(fresh, total_steps=config.total_steps, phase="submitted", updated_at=time.time()))
    try:
        return jobs.submit(cluster, run, attempt, config.run.secrets)
    except ClusterError as error:
        end_orphan(run, RunState.FAILED, str(error))
        raise


def supervisor_watch(cluster: Cluster | None, run: RunDirectory) -> Callable[[], None]:
    """Looks after the supervisor every few seconds; when it is gone without having ended its run, the run is FAILED."""
    last = time.monotonic()

    def check() -> None:
        nonlocal last
        if time.monotonic() - last < ALIVE_CHECK_S:
            return
        last = time.monotonic()
        if reason := supervisor_gone(cluster, run):
            end_orphan(run, RunState.FAILED, reason)

    return check


def supervisor_gone(cluster: Cluster | None, run: RunDirectory) -> str | None:
    """Why nobody looks after this unfinished run any more, or None when somebody does (or nobody can tell now)."""
    status = run.status()
    if status is None or status.state in FINAL:
        return None
    try:
        if cluster is None or not cluster.alive():
            return f"the head of cluster {status.cluster!r} is gone"
    except PodlaunchError:
        return None
    job = jobs.job_id(run, status.attempt) if status.job is None else status.job
    try:
        if jobs.status(cluster, job) not in jobs.ENDED:
            return None
        tail = " | ".join(jobs.logs(cluster, job).splitlines()[-3:])
    except HeadRefused as error:
        return f"the head of cluster {status.cluster!r} knows no job {job!r}" if error.code == 404 else None
    except ClusterError:
        return None
    return f"its supervisor ended unexpectedly: {tail}"


def end_orphan(run: RunDirectory, state: RunState, reason: str) -> None:
    """Give an unfinished run whose supervisor is gone its final state; one that was finished meanwhile is left as it is."""
    status = run.status()
    if status is not None and status.state not in FINAL:
        now = time.time()
        run.write_status(dataclasses.replace(status, state=state, phase="", reason=reason, ended_at=now, updated_at=now))
        run.append_event({"event": "state", "state": state.value, "attempt": status.attempt, "reason": reason})


def _run_command_line(arguments: Sequence[str]) -> int:
    """Plain overrides are composed here; Hydra's own flags (--help, --cfg, --multirun, ...) go through Hydra's main."""
    if any(argument.startswith("-") for argument in arguments):
        return _run_hydra()
    return launch(load(compose_config(arguments)), Console())


def _run_hydra() -> int:
    import hydra

    register_schema()
    sys.argv[1:] = quote_entrypoint(sys.argv[1:])

    def point(config: DictConfig) -> int:
        code = launch(load(config), Console())
        if code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            raise PodlaunchError(f"the run ended with exit code {code}")
        return code

    hydra.main(config_path=str(config_dir()), config_name=CONFIG_NAME, version_base="1.3")(point)()
    return 0
