"""`tpu start`: bring a cluster up, or slices without Ray."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import typer

from cluster import clusters
from cluster.config import ClusterConfig, TPUConfig
from cluster.tpu.provider import TPUProvider
from launcher.cli.options import CONSOLE, ERRORS, confirm
from launcher.compose import compose_cluster
from launcher.config import read_yaml


def start(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[PROFILE] [key=value]...", help="A profile of conf/cluster and settings of it.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file with the same settings instead of a profile.")] = None,
    bare: Annotated[bool, typer.Option(help="Slices only, without a Ray cluster.")] = False,
    slices: Annotated[int | None, typer.Option(min=0, help="So many slices shall always be there.")] = None,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
) -> None:
    """Bring a cluster up (default profile: local)."""
    settings = _settings(overrides or [], config)
    if slices is not None:
        most = max(slices, settings.effective_max_slices)
        settings = dataclasses.replace(settings, min_slices=slices, max_slices=most)
    _print_plan(settings)
    if settings.usd_per_hour != 0.0:
        confirm(f"Start {settings.name!r}?", yes)
    if bare:
        _start_bare(settings)
        return
    cluster = clusters.up(settings, lambda text: ERRORS.print(text, highlight=False))
    CONSOLE.print(f"cluster {cluster.name!r} is up; dashboard {cluster.head.dashboard_url}", highlight=False, soft_wrap=True)


def _settings(overrides: list[str], config: Path | None) -> ClusterConfig:
    if config is not None:
        settings = ClusterConfig.from_dict(read_yaml(config))
    else:
        profile = [f"cluster={word}" for word in overrides if "=" not in word]
        rest = [f"cluster.{word.removeprefix('cluster.')}" for word in overrides if "=" in word]
        settings = compose_cluster([*profile, *rest])
    return settings.with_environment(os.environ)


def _print_plan(config: ClusterConfig) -> None:
    kind = config.accelerator
    price = config.usd_per_slice_hour
    each = "price unknown" if price is None else f"${price:.2f} an hour each"
    shape = f"{kind.name} ({kind.topology}), {kind.hosts} hosts and {kind.chips} chips a slice"
    ERRORS.print(f"{config.name}: {shape}, {each}", highlight=False)


def _start_bare(config: TPUConfig) -> None:
    for one in TPUProvider.connect(config).start().slices:
        CONSOLE.print(f"{one.name}  {one.zone}  {one.state}  {', '.join(one.hosts)}", highlight=False, soft_wrap=True)
