"""`tpu exec`: a command on the hosts of a slice."""

import sys
from typing import Annotated

import typer

from cluster import remote
from cluster.fan_out import run_all
from launcher.cli.named import check_host, slice_named


def execute(
    name: Annotated[str, typer.Argument(help="A slice, or a cluster that has one slice.")],
    words: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="The command; sh -c '...' where a shell is needed.")],
    host: Annotated[int | None, typer.Option(min=0, help="Only this host, by worker id.")] = None,
) -> None:
    """Run a command on all hosts of a slice at once; ends with 0, or the highest of their exit codes. Ctrl-C ends it everywhere."""
    config, item = slice_named(name)
    if host is not None:
        check_host(item, host)
    hosts = range(len(item.hosts)) if host is None else [host]
    codes = run_all(remote.programs(config, item, hosts, remote.supervised(words)), _write)
    raise typer.Exit(max(codes.values()))


def _write(host: int, is_error: bool, line: bytes) -> None:
    stream = (sys.stderr if is_error else sys.stdout).buffer
    stream.write(b"host %d: %b" % (host, line))
    stream.flush()
