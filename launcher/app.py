"""From the command line to a finished run; shared by launch.py, the console script `podlaunch` and `tpu train run`."""

import contextlib
import dataclasses
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence

import yaml
from omegaconf import DictConfig
from rich.console import Console

from cluster import clusters
from cluster.clusters import Cluster
from cluster.config import ClusterConfig
from cluster.errors import ClusterError, ConfigError, PodlaunchError
from launcher import jobs, programs
from launcher.attempts import claim_next, end_run, next_attempt, submit_next
from launcher.code import pack_data
from launcher.compose import CONFIG_NAME, compose_config, config_dir, explain, load, register_schema, spell_out
from launcher.config import LaunchConfig
from launcher.estimate.run import check_memory
from launcher.follow import follow
from launcher.guard import guarded
from launcher.index import Entry, RunIndex, index_of, keeper_command
from launcher.plan import describe
from launcher.preflight import prepare_run
from launcher.run_files import is_object
from launcher.runs import RunDirectory, RunState, RunStatus
from launcher.watch import SupervisorWatch

logger = logging.getLogger(__name__)

VERBOSE = ("-v", "--verbose")


def main() -> None:
    """The entry point of launch.py and of `podlaunch`. Exits 0 when the run succeeded, 100 when it failed, 2 for a wrong setting."""
    arguments = [word for word in sys.argv[1:] if word not in VERBOSE]
    verbose = len(arguments) < len(sys.argv) - 1
    sys.exit(guarded(lambda: _run_command_line(arguments), "launch", verbose=verbose))


def launch(config: LaunchConfig, console: Console, *, detach: bool = False, dry_run: bool = False) -> int:
    """Bring the cluster up where needed, submit the run, follow it to its end. Returns the exit code.

    `dry_run`: check everything, say what would be done, and return.

    Raises ConfigError before anything is started, ClusterError when the cluster cannot be brought up.
    """
    config = config.with_environment(os.environ).with_absolute_paths()
    check_memory(config)
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
    if dry_run:
        console.print(yaml.safe_dump(config.to_dict(), sort_keys=False), highlight=False, soft_wrap=True, markup=False)
        return 0
    cluster = bring_up(config.cluster, lambda text: console.print(text, highlight=False, soft_wrap=True, markup=False))
    if data is not None:
        run.write_data(data)
    submit(cluster, run, config, code)
    if detach:
        console.print(f"submitted; follow it with: tpu train attach {run.url}", highlight=False, soft_wrap=True)
        return 0
    return follow(run, console, check=SupervisorWatch(cluster.name, run))


def bring_up(config: ClusterConfig, say: Callable[[str], None]) -> Cluster:
    """The cluster of `config`, brought up when it is not, with a keeper beside its head; runs that `tpu stop --keep-runs` suspended go on.

    Raises ClusterError when it cannot be brought up, or is up and cannot serve `config`.
    """
    cluster = clusters.up(config, say, companion=keeper_command(config))
    index = index_of(cluster.config)
    for entry in index.entries():
        status = index.run(entry).status()
        if status is not None and status.state is RunState.SUSPENDED and status.cluster == cluster.name:
            say(_take_up(cluster, index, entry, status))
    return cluster


def _take_up(cluster: Cluster, index: RunIndex, entry: Entry, status: RunStatus) -> str:
    """Go on with a suspended run. Returns what became of it, in words."""
    run = index.run(entry)
    stays = f"run {run.url} stays SUSPENDED: "
    if missing := [name for name in entry.secret_names if not os.environ.get(name)]:
        return f"{stays}it was started with {', '.join(missing)}; set that and bring the cluster up again"
    try:
        clusters.check_fits(cluster, run.config().slices)
    except PodlaunchError as error:
        return f"{stays}{error}"
    claimed = claim_next(run)
    if claimed is None:
        return f"run {run.url} is being taken up by another command"
    run.clear_stop_request()
    attempt, job = claimed
    secrets, names = jobs.store_secrets(cluster, run, entry.secret_names)
    idle = status.accounted_until(time.time())
    again = dataclasses.replace(idle, state=RunState.QUEUED, attempt=attempt, job=job, phase="submitted", reason=None, spent={})
    run.append_event({"event": "state", "state": again.state.value, "attempt": attempt})
    submit_next(run, Entry(entry.run_directory, secrets, names), index, cluster.http, again)
    return f"run {run.url} goes on"


def submit(cluster: Cluster, run: RunDirectory, config: LaunchConfig, code: bytes) -> str:
    """Write the run directory and start the run's supervisor. Returns the job's id. Raises ClusterError."""
    before = run.status()
    if before is not None and before.cluster != cluster.name:
        index_of(run.config().cluster).forget(run)  # it was suspended there
    jobs.check_free(cluster.http, run, jobs.job_id(run, next_attempt(run)))
    claimed = claim_next(run)
    if claimed is None:
        raise ClusterError(f"run {run.run_id!r} is being started by another command; follow it with `tpu train attach {run.url}`")
    attempt, job = claimed
    run.create(config)
    run.clear_stop_request()
    run.clear_profile_request()
    run.write_code(code)
    if not config.is_script:
        programs.send(config, run.files)
    now = time.time()
    fresh = RunStatus(run_id=run.run_id, cluster=cluster.name, state=RunState.QUEUED, started_at=now, attempt=attempt, job=job)
    if before is not None:
        fresh = fresh.after(before.accounted_until(now))
    index = index_of(cluster.config)
    secrets, names = jobs.store_secrets(cluster, run, config.run.secrets)
    status = dataclasses.replace(fresh, total_steps=config.total_steps, phase="submitted", updated_at=now)
    try:
        return submit_next(run, Entry(run.url, secrets, names), index, cluster.http, status)
    except ClusterError as error:
        end_run(run, RunState.FAILED, str(error), index)
        raise


def _run_command_line(arguments: Sequence[str]) -> int:
    """Plain overrides are composed here; Hydra's own flags (--help, --cfg, --multirun, ...) go through Hydra's main."""
    if any(argument.startswith("-") for argument in arguments):
        return _run_hydra(arguments)
    return launch(load(compose_config(arguments)), Console())


def _check_flags(arguments: Sequence[str]) -> None:
    """Raises ConfigError for flags that Hydra does not know, at which it would print all that it does know."""
    from hydra._internal.utils import get_args_parser

    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            get_args_parser().parse_args(arguments)
        except SystemExit:
            reason = said.getvalue().rpartition(" error: ")[2].strip()
            raise ConfigError(f"{reason}; `--help` tells what there is") from None


def _run_hydra(arguments: Sequence[str]) -> int:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register_schema()
    sys.argv[1:] = spell_out(arguments)
    _check_flags(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # what is raised comes here, where it becomes one line and an exit code

    def one_run(config: DictConfig) -> None:
        if code := launch(load(config), Console()):
            raise SystemExit(code)

    try:
        hydra.main(config_path=str(config_dir()), config_name=CONFIG_NAME, version_base="1.3")(one_run)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    return 0
