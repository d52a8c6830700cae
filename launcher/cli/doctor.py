"""`tpu doctor`: what this machine, and the project of a cluster, lack."""

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.options import CONSOLE

if TYPE_CHECKING:
    from launcher.doctor import Finding


def doctor(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[PROFILE] [key=value]...", help="Also look at what this cluster needs, as for tpu start.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
) -> None:
    """Check this machine, and with a profile its project; changes nothing. Exits 1 when something is not well."""
    findings = []
    for finding in _findings(overrides or []):
        findings.append(finding)
        if not as_json:
            _line(f"{'ok  ' if finding.well else 'FAIL'}  {finding.name}: {finding.said}")
            if not finding.well and finding.fix:
                _line(f"      {finding.fix}")
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    if not all(finding.well for finding in findings):
        raise typer.Exit(1)


def _findings(overrides: list[str]) -> Iterator["Finding"]:
    from launcher.doctor import check_cloud, check_machine  # what reads requirements takes a tenth of a second to import

    yield from check_machine()
    if overrides:
        from launcher.compose import compose_profile

        config = compose_profile(overrides).with_environment(os.environ)
        if config.cloud != "emulated":  # that one runs on this machine, and is started when it is needed
            yield from check_cloud(config)


def _line(text: str) -> None:
    CONSOLE.print(text, highlight=False, soft_wrap=True, markup=False)
