"""`tpu ssh`: a shell on a host."""

import os
import sys
from typing import Annotated

import typer

from cluster import remote
from launcher.cli.named import check_host, slice_named


def ssh(
    name: Annotated[str, typer.Argument(help="A slice, or a cluster that has one slice.")],
    host: Annotated[int, typer.Option(min=0, help="Which host, by worker id.")] = 0,
) -> None:
    """Open a shell on a host of a slice; ends with the shell's exit code."""
    config, item = slice_named(name)
    check_host(item, host)
    program = remote.programs(config, item, [host], None)[host]
    if program.cwd is not None:
        os.chdir(program.cwd)
    sys.stdout.flush()
    os.execvpe(program.argv[0], list(program.argv), dict(program.env))  # terminal, input and signals are the shell's from here
