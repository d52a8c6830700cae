"""`tpu train profile RUN`: a trace of some steps on every host, for XProf and TensorBoard."""

import time
from collections.abc import Callable
from typing import Annotated

import typer

from cluster.errors import ConfigError, PodlaunchError
from launcher.cli.options import CONSOLE, DEFAULT_ROOT, Root, Run, locate_run
from launcher.profiles import FOLDER, MOST_STEPS, ProfileRequest, traces_of
from launcher.runs import ALONE, AT_REST, RunDirectory


def profile(
    run: Run,
    root: Root = DEFAULT_ROOT,
    steps: Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="How many steps are traced.")] = 5,
) -> None:
    """Trace some steps of a run that trains, on all its hosts, and say where the trace is."""
    directory = locate_run(run, root)
    _check(directory)
    request = ProfileRequest.now(steps, time.time())
    if not directory.request_profile(request):
        raise PodlaunchError(f"somebody else waits for a profile of run {directory.run_id!r} already; try again when it is there")
    CONSOLE.print(f"tracing {steps} steps; Ctrl-C leaves the request to the run", highlight=False)
    wait_for_traces(directory, request, time.sleep)
    CONSOLE.print(f"{directory.url}/{traces_of(request.id)}", highlight=False, soft_wrap=True, markup=False)
    CONSOLE.print(f"open it with: xprof {directory.url}/{FOLDER}", highlight=False, soft_wrap=True, markup=False)


def wait_for_traces(run: RunDirectory, request: ProfileRequest, sleep: Callable[[float], None]) -> None:
    """Return when every host's trace is in the run directory. Raises PodlaunchError when that will not be."""
    events = run.events()
    while True:
        for event in events:
            if event["event"] == "profile_failed" and event["id"] == request.id:
                raise PodlaunchError(f"no profile of host {event['host']}: {event['error']}")
        status = run.status()
        if status is not None and 0 < status.hosts <= len(run.traces(request)):
            return
        if status is None or status.state in AT_REST:
            run.clear_profile_request()
            raise PodlaunchError(f"run {run.run_id!r} ended before its profile was taken")
        sleep(run.poll_s)


def _check(run: RunDirectory) -> None:
    """Raises PodlaunchError for a run that nobody can trace."""
    status = run.status()
    if status is None or status.state in AT_REST:
        state = "was never started" if status is None else f"is {status.state}"
        raise PodlaunchError(f"run {run.run_id!r} {state}; only one that trains can be traced")
    if run.config().is_script:
        raise ConfigError(f"run {run.run_id!r} is a program of your own: let it call jax.profiler.start_trace itself")
    if status.cluster == ALONE:
        raise ConfigError(f"run {run.run_id!r} trains in a process of its own, without a supervisor; launch it on a cluster to trace it")
