"""`tpu train run|attach|status|logs|stop`: training runs."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cluster.errors import PodlaunchError
from launcher import app as launcher_app
from launcher.attempts import end_run
from launcher.cli.options import CONSOLE, cluster_of, locate_run, storage_endpoint
from launcher.compose import compose_file
from launcher.follow import follow
from launcher.index import index_of
from launcher.run_files import is_object
from launcher.runs import FINAL, RunState, StopRequest, list_runs
from launcher.watch import SupervisorWatch, looked_after

app = typer.Typer(help="Training runs.", no_args_is_help=True, rich_markup_mode=None)

Root = Annotated[str, typer.Option("--root", help="The place that holds run directories: a folder, or gs://<bucket>/<folder>.")]
Run = Annotated[str, typer.Argument(help="A run's name, or the path of its directory.")]
DEFAULT_ROOT = "runs"


@app.command("run")
def run(
    config: Annotated[Path, typer.Argument(help="A YAML file with model, data, trainer, run and cluster settings.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="As for launch.py.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="The run directory itself: a folder, or gs://<bucket>/<folder>.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the run's newest good checkpoint.")] = False,
    detach: Annotated[bool, typer.Option(help="Submit and return.")] = False,
) -> None:
    """Train as a config file says."""
    given = list(overrides or [])
    if output_dir is not None:
        place = output_dir.rstrip("/") if is_object(output_dir) else str(Path(output_dir).absolute())
        root, _, name = place.rpartition("/")
        given += [f"run.root='{root}'", f"run.name='{name}'"]
    if resume:
        given.append("run.resume=true")
    raise typer.Exit(launcher_app.launch(compose_file(config, given), CONSOLE, detach=detach))


@app.command("attach")
def attach(run: Run, root: Root = DEFAULT_ROOT) -> None:
    """Follow a run that is going on."""
    directory = locate_run(run, root)
    status = directory.status()
    cluster = directory.config().cluster.name if status is None else status.cluster
    raise typer.Exit(follow(directory, CONSOLE, check=SupervisorWatch(cluster, directory)))


@app.command("status")
def status(
    run: Annotated[str | None, typer.Argument(help="One run; without it, a table of all.")] = None,
    root: Root = DEFAULT_ROOT,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
) -> None:
    """Show runs."""
    directories = [locate_run(run, root)] if run is not None else list_runs(root, storage_endpoint(root))
    found = [status for directory in directories if (status := directory.status()) is not None]
    if as_json:
        rows = [status.to_dict() for status in found]
        print(json.dumps(rows[0] if run is not None else rows, indent=1))
        return
    table = Table("RUN", "STATUS", "STEP", "LOSS", "RECOVERIES", "DURATION", box=None)
    for one in found:
        loss = "" if one.loss is None else f"{one.loss:.4f}"
        minutes = ((one.ended_at or one.updated_at) - one.started_at) / 60
        step = f"{one.step}/{one.total_steps or '?'}" if one.step or one.total_steps else ""
        table.add_row(one.run_id, one.state, step, loss, str(one.recoveries.total), f"{minutes:.1f} min")
    CONSOLE.print(table)
    for one in found if run is not None else []:
        if one.reason:
            CONSOLE.print(one.reason, highlight=False, soft_wrap=True, markup=False)


@app.command("logs")
def logs(
    run: Run,
    root: Root = DEFAULT_ROOT,
    host: Annotated[int | None, typer.Option(help="Only this host.")] = None,
    attempt: Annotated[int | None, typer.Option(help="This attempt instead of the newest.")] = None,
    tail: Annotated[int | None, typer.Option(min=1, help="Only so many last lines of each host.")] = None,
) -> None:
    """Print what a run's training processes wrote, each line with its host; also when the cluster is gone."""
    directory = locate_run(run, root)
    found = directory.logs()
    chosen = attempt if attempt is not None else max(found, default=0)
    wanted = [index for index in found.get(chosen, []) if host in (None, index)]
    if not wanted:
        raise PodlaunchError(f"run {directory.run_id!r} has no such logs; attempts: {', '.join(map(str, found)) or 'none yet'}")
    for index in wanted:
        lines = directory.read_log(chosen, index).decode(errors="replace").splitlines()
        for line in lines[-tail:] if tail is not None else lines:
            print(f"host-{index}  {line}")


@app.command("stop")
def stop(
    run: Run,
    root: Root = DEFAULT_ROOT,
    now: Annotated[bool, typer.Option("--now", help="End at once, without a checkpoint: what came after the last one is lost.")] = False,
) -> None:
    """Ask a run to checkpoint and end."""
    directory = locate_run(run, root)
    status = directory.status()
    if status is not None and status.state in FINAL:
        raise PodlaunchError(f"run {directory.run_id!r} is {status.state} already")
    directory.request_stop(StopRequest.NOW if now else StopRequest.SAVE)
    cluster = cluster_of(directory)
    if status is not None and (status.state is RunState.SUSPENDED or not looked_after(cluster)):
        index = index_of(directory.config().cluster if cluster is None else cluster.config)
        end_run(directory, RunState.STOPPED, "stopped on request", index)
        CONSOLE.print(f"run {directory.run_id!r} is STOPPED", highlight=False)
        return
    text = f"run {directory.run_id!r} will {'end' if now else 'checkpoint and end'}; follow it with: tpu train attach {directory.url}"
    CONSOLE.print(text, highlight=False, soft_wrap=True)
