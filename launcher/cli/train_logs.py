"""`tpu train logs`: what a run's training processes wrote, from its directory; also when hosts and cluster are gone."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated

import typer

from cluster.durations import parse_duration
from cluster.errors import ConfigError, PodlaunchError
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
    since: Annotated[str | None, typer.Option(metavar="TIME", help="Only of the last 90s, 10m, 2h; of all attempts.")] = None,
) -> None:
    """Print what a run's training processes wrote, each line with its host; also when the cluster is gone."""
    directory = locate_run(run, root)
    wanted = Wanted(host, attempt, tail, None if since is None else time.time() - _seconds(since))
    lines = following(directory, wanted, time.sleep) if follow else written(directory, wanted)
    for line in lines:
        print(line, flush=follow)


@dataclass(frozen=True)
class Wanted:
    """Which lines. None: no limit."""

    host: int | None = None
    attempt: int | None = None
    tail: int | None = None
    """Of each host, what is there at first."""
    since: float | None = None
    """Seconds since the epoch."""

    def hosts(self, found: list[int]) -> list[int]:
        return [index for index in found if self.host in (None, index)]

    def first(self, run: RunDirectory) -> int:
        """The attempt to begin with."""
        if self.attempt is not None:
            return self.attempt
        return 0 if self.since is not None else max(run.logs(), default=0)

    def cut(self, run: RunDirectory, attempt: int, host: int, lines: list[bytes]) -> list[bytes]:
        """Of what a log holds from its beginning."""
        if self.since is not None:
            passed, before = 0, run.log_length(attempt, host, self.since)
            while lines and passed < before:
                passed += len(lines[0])
                lines = lines[1:]
        return lines[-self.tail :] if self.tail is not None else lines


@dataclass
class _Printed:
    """Lines with their hosts; where another attempt begins, its number."""

    last: int | None = field(default=None)

    def lines(self, attempt: int, host: int, lines: list[bytes]) -> Iterator[str]:
        if lines and attempt != self.last:
            if self.last is not None:
                yield f"attempt {attempt}"
            self.last = attempt
        yield from (f"host-{host}  {line.decode(errors='replace').rstrip()}" for line in lines)


def written(run: RunDirectory, wanted: Wanted) -> Iterator[str]:
    """What is there now. Raises PodlaunchError where there are no such logs."""
    found, begin, printed = run.logs(), wanted.first(run), _Printed()
    chosen = [(number, index) for number in found if _is_wanted(number, begin, wanted) for index in wanted.hosts(found[number])]
    if not chosen:
        raise PodlaunchError(f"run {run.run_id!r} has no such logs; attempts: {', '.join(map(str, found)) or 'none yet'}")
    for number, index in chosen:
        yield from printed.lines(number, index, wanted.cut(run, number, index, run.read_log(number, index).splitlines(keepends=True)))


def following(run: RunDirectory, wanted: Wanted, sleep: Callable[[float], None]) -> Iterator[str]:
    """Lines as they come, until the run is at rest. Raises PodlaunchError for an attempt or a host that a run at rest does not have."""
    if (status := run.status()) is not None and status.state in AT_REST:
        yield from written(run, wanted)
        return
    begin, printed = wanted.first(run), _Printed()
    tails: dict[tuple[int, int], Tail] = {}
    while True:
        status = run.status()
        at_rest = status is None or status.state in AT_REST  # looked at before the logs: what came before the end is printed
        for number, hosts in run.logs().items():
            if not _is_wanted(number, begin, wanted):
                continue
            for index in wanted.hosts(hosts):
                first = (number, index) not in tails
                lines = list(tails.setdefault((number, index), run.tail_log(number, index))())
                yield from printed.lines(number, index, wanted.cut(run, number, index, lines) if first else lines)
        if at_rest:
            return
        sleep(run.poll_s)


def _is_wanted(attempt: int, begin: int, wanted: Wanted) -> bool:
    return attempt >= begin and wanted.attempt in (None, attempt)


def _seconds(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ConfigError(f"--since {error}") from error
