"""`tpu train`: training runs. Looking at them is in files of their own (train_status.py, train_logs.py, train_compare.py and others)."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cluster.errors import ConfigError, PodlaunchError
from launcher.attempts import end_run
from launcher.cli import check, train_compare, train_logs, train_profile, train_report, train_status
from launcher.cli.options import CONSOLE, DEFAULT_ROOT, Root, Run, cluster_of, locate_run
from launcher.follow import follow
from launcher.index import index_of
from launcher.run_files import is_object
from launcher.runs import FINAL, RunState, StopRequest
from launcher.watch import SupervisorWatch, looked_after


class _Runs(TyperGroup):
    """`tpu train CONFIG.yaml` means `tpu train run CONFIG.yaml`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0].endswith((".yaml", ".yml")):
            args = ["run", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_Runs, help="Training runs.", no_args_is_help=True, rich_markup_mode=None)
app.command("status")(train_status.status)
app.command("logs")(train_logs.logs)
app.command("compare")(train_compare.compare)
app.command("profile")(train_profile.profile)
app.command("report")(train_report.report)


@app.command("run")
def run(
    config: Annotated[Path, typer.Argument(help="A YAML file with model, data, trainer, run and cluster settings.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="As for launch.py.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="The run directory itself: a folder, or gs://<bucket>/<folder>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest good checkpoint.")] = False,
    resume_from: Annotated[str | None, typer.Option(metavar="RUN", help="Go on with this run, by its name or its directory.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Submit and return.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan and the settings, start nothing.")] = False,
) -> None:
    """Train as a config file says."""
    from launcher.app import launch  # composing needs Hydra, which takes half a second to import
    from launcher.compose import compose_file

    if output_dir is not None and resume_from is not None:
        raise ConfigError("--output-dir and --resume-from name two run directories: give one of them")
    given = [*(overrides or []), *_place(output_dir)]
    if resume_from is not None:
        root = compose_file(config, given).run.root or DEFAULT_ROOT
        given += _place(locate_run(resume_from, root).url)
    if resume or resume_from is not None:
        given.append("run.resume=true")
    raise typer.Exit(launch(compose_file(config, given), CONSOLE, detach=detach, dry_run=dry_run))


def _place(directory: str | None) -> list[str]:
    """The overrides that make this the run directory."""
    if directory is None:
        return []
    place = directory.rstrip("/") if is_object(directory) else str(Path(directory).absolute())
    root, _, name = place.rpartition("/")
    return [f"run.root='{root}'", f"run.name='{name}'"]


app.command("check")(check.check)


@app.command("attach")
def attach(run: Run, root: Root = DEFAULT_ROOT) -> None:
    """Follow a run that is going on."""
    directory = locate_run(run, root)
    status = directory.status()
    cluster = directory.config().cluster.name if status is None else status.cluster
    raise typer.Exit(follow(directory, CONSOLE, check=SupervisorWatch(cluster, directory)))


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
