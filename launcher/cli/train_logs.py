"""`tpu train logs`: what a run's training processes wrote, from its directory; also when hosts and cluster are gone."""

import time
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from cluster.errors import PodlaunchError
from launcher.cli.options import DEFAULT_ROOT, Root, Run, locate_run
from launcher.run_files import Tail
from launcher.runs import AT_REST, RunDirectory


def logs(
    run: Run,
    root: Root = DEFAULT_ROOT,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes until the run ends.")] = False,
    host: Annotated[int | None, typer.Option(help="Only this host.")] = None,
    attempt: Annotated[int | None, typer.Option(help="This attempt instead of the newest.")] = None,
    tail: Annotated[int | None, typer.Option(min=1, help="Only so many last lines of each host.")] = None,
) -> None:
    """Print what a run's training processes wrote, each line with its host; also when the cluster is gone."""
    directory = locate_run(run, root)
    found = directory.logs()
    chosen = attempt if attempt is not None else max(found, default=0)
    wanted = [index for index in found.get(chosen, []) if host in (None, index)]
    if not wanted and not (follow and attempt is None):
        raise PodlaunchError(f"run {directory.run_id!r} has no such logs; attempts: {', '.join(map(str, found)) or 'none yet'}")
    if follow:
        for line in following(directory, host, attempt, tail, time.sleep):
            print(line, flush=True)
        return
    for index in wanted:
        lines = directory.read_log(chosen, index).decode(errors="replace").splitlines()
        for text in lines[-tail:] if tail is not None else lines:
            print(f"host-{index}  {text}")


def following(run: RunDirectory, host: int | None, attempt: int | None, tail: int | None, sleep: Callable[[float], None]) -> Iterator[str]:
    """Lines as they come, until the run is at rest. Begins with the newest attempt, or with the only one that is wanted."""
    begin = attempt if attempt is not None else max(run.logs(), default=0)
    tails: dict[tuple[int, int], Tail] = {}
    told = -1
    while True:
        status = run.status()
        at_rest = status is None or status.state in AT_REST  # looked at before the logs: what came before the end is printed
        for number, hosts in run.logs().items():
            if number < begin or attempt not in (None, number):
                continue
            for index in [index for index in hosts if host in (None, index)]:
                first = (number, index) not in tails
                read = tails.setdefault((number, index), run.tail_log(number, index))
                lines = [line.decode(errors="replace").rstrip("\n") for line in read()]
                if lines and number != told:
                    if told >= 0:
                        yield f"attempt {number}"
                    told = number
                yield from (f"host-{index}  {line}" for line in (lines[-tail:] if first and tail is not None else lines))
        if at_rest:
            return
        sleep(run.poll_s)
