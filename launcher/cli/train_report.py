"""`tpu train report RUN`: one HTML page about a run."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import ConfigError, PodlaunchError
from launcher.cli.options import CONSOLE, DEFAULT_ROOT, Root, Run, locate_run
from launcher.report.story import read_story


def report(
    run: Run,
    root: Root = DEFAULT_ROOT,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="By default <run>.html in this folder.")] = None,
) -> None:
    """Write a page with a run's curves, attempts, faults, goodput, samples and settings."""
    if importlib.util.find_spec("plotly") is None:
        raise ConfigError("`tpu train report` needs Plotly, which is not installed here: pip install 'podlaunch[report]'")
    from launcher.report.page import render

    directory = locate_run(run, root)
    story = read_story(directory)
    if story is None:
        raise PodlaunchError(f"run {directory.run_id!r} was never submitted; there is nothing to report")
    place = output if output is not None else Path(f"{directory.run_id}.html")
    try:
        place.write_text(render(story), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {place}: {error.strerror}; choose another file with --output") from error
    CONSOLE.print(str(place), highlight=False, soft_wrap=True, markup=False)
