"""`tpu start`: bring a cluster up, or slices without Ray."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster import bare as bare_slices
from cluster import clusters, local
from cluster.autoscaler import host_settings
from cluster.clusters import Cluster
from cluster.config import ClusterConfig
from cluster.durations import parse_duration
from cluster.errors import ConfigError
from cluster.head import head_requests
from cluster.node_names import slice_id
from cluster.state import clusters_dir
from cluster.token import token_place
from cluster.tpu.owner import owner_id
from cluster.tpu.requests import plan, slice_names
from cluster.vm.bootstrap import host_metadata
from cluster.vm.bundle import Bundle, bundle_hash
from cluster.yaml_files import read_settings
from launcher.cli.coming import wait_for_slices
from launcher.cli.options import CONSOLE, ERRORS, confirm
from launcher.index import keeper_command


def start(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[PROFILE] [key=value]...", help="A profile of conf/cluster and settings of it.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file with the same settings instead of a profile.")] = None,
    bare: Annotated[bool, typer.Option(help="Slices only, without a Ray cluster.")] = False,
    slices: Annotated[int | None, typer.Option(min=0, help="So many slices shall always be there.")] = None,
    autostop: Annotated[
        str | None, typer.Option(metavar="TIME", help="Delete the cluster when no run was going on for so long, such as 2h.")
    ] = None,
    timeout: Annotated[
        str | None, typer.Option(metavar="TIME", help="With --bare: give up after this long, such as 30m, and delete what was made.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when the head is up, without waiting for --slices.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the exact API requests, secrets redacted, and send none.")] = False,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
) -> None:
    """Bring a cluster up (default profile: local)."""
    from launcher.app import bring_up  # composing needs Hydra, which takes half a second to import

    settings = _settings(overrides or [], config)
    if slices is not None:
        most = max(slices, settings.effective_max_slices)
        settings = dataclasses.replace(settings, min_slices=slices, max_slices=most)
    if autostop is not None:
        settings = dataclasses.replace(settings, autostop=autostop)
    limit = _seconds(timeout, bare=bare)
    clusters.check_name(settings.name, bare=bare)
    _print_plan(settings)
    if dry_run:
        print(json.dumps(_requests(settings, bare=bare), indent=1))
        return
    if settings.usd_per_hour != 0.0:
        confirm(f"Start {settings.name!r}?", yes)
    if bare and settings.existing:
        raise ConfigError("cluster.existing goes with a cluster: with --bare there is nothing that existing slices could join")
    if bare:
        _start_bare(settings, limit)
        return
    cluster = bring_up(settings, lambda text: ERRORS.print(text, highlight=False, soft_wrap=True, markup=False))
    CONSOLE.print(f"cluster {cluster.name!r} is up; dashboard {cluster.head.show_url()}", highlight=False, soft_wrap=True)
    if settings.min_slices and not detach:
        _wait(cluster, settings.min_slices)


def _wait(cluster: Cluster, slices: int) -> None:
    try:
        wait_for_slices(cluster, slices, lambda text: ERRORS.print(text, highlight=False, soft_wrap=True, markup=False))
    except KeyboardInterrupt:
        ERRORS.print(f"the cluster stays up and its slices go on coming; end it with `tpu stop {cluster.name}`", highlight=False)
        raise


def _settings(overrides: list[str], config: Path | None) -> ClusterConfig:
    from launcher.compose import compose_profile

    settings = ClusterConfig.from_dict(read_settings(config)) if config is not None else compose_profile(overrides)
    return settings.with_environment(os.environ)


def _print_plan(config: ClusterConfig) -> None:
    kind = config.accelerator
    price = config.usd_per_slice_hour
    each = "price unknown" if price is None else f"${price:.2f} an hour each"
    shape = f"{kind.name} ({kind.topology}), {kind.hosts} hosts and {kind.chips} chips a slice"
    head = f"; head on a VM, {config.head_machine_type}" if config.effective_head == "vm" else ""
    ERRORS.print(f"{config.name}: {shape}, {each}{head}", highlight=False, soft_wrap=True)


def _requests(config: ClusterConfig, *, bare: bool) -> list[dict[str, Any]]:
    """What would be sent. In a cluster the node provider sends it, and what only a running head knows is shown as a placeholder."""
    if bare:
        return plan(config, slice_names(config), owner=owner_id())
    folder, bundle = clusters_dir() / config.name, Bundle(bundle_hash())
    metadata = host_metadata(bundle, host_settings(config, "HEAD:PORT", token_place(config, folder)))
    names = [slice_id(config.name, "dry-run", index) for index in range(max(config.slices, config.min_slices))]
    head = head_requests(config, bundle, folder, owner_id(), keeper_command(config))
    return [*head, *plan(config, names, owner=owner_id(), metadata=metadata)]


def _start_bare(config: ClusterConfig, timeout: float | None) -> None:
    if config.cloud == "emulated":
        config = local.with_local_endpoints(config, bundle_hash())
    status = bare_slices.start(config, lambda text: ERRORS.print(text, highlight=False, soft_wrap=True), timeout=timeout)
    for one in status.slices:
        CONSOLE.print(f"{one.name}  {one.zone}  {one.state}  {', '.join(one.hosts)}", highlight=False, soft_wrap=True)


def _seconds(timeout: str | None, *, bare: bool) -> float | None:
    if timeout is None:
        return None
    if not bare:
        raise ConfigError("--timeout goes with --bare: a cluster is up before its slices, and its autoscaler goes on asking for them")
    try:
        return parse_duration(timeout)
    except ValueError as error:
        raise ConfigError(f"--timeout {error}") from error
