"""The clusters of this user: brought up, found by name, ended whole.

A cluster is found by its record `<state>/clusters/<name>/cluster.json`, written before anything of it is created, or, when another machine
made it, by the labels of its head VM. Its slices are created by the node provider on the head alone.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import bare as bare_slices
from cluster import existing, local
from cluster.autoscaler import host_settings, node_type
from cluster.config import ClusterConfig
from cluster.durations import parse_duration
from cluster.errors import ClusterError, ConfigError
from cluster.head_here import HereHead
from cluster.heads import Head, Progress
from cluster.ray_http import RayHttp
from cluster.services import Connect, Where, connect
from cluster.state import cluster_dir, clusters_dir, read_json, write_atomic
from cluster.token import delete_secrets, fetch_token, make_token, secret_name, share_token, token_place
from cluster.tpu.provider import TPUProvider
from cluster.tpu.slices import OWNER_LABEL
from cluster.tunnel import TunnelError
from cluster.versions import disagreement, maker, own_versions
from cluster.vm.bootstrap import startup_script
from cluster.vm.bundle import Bundle, bundle_hash, ensure_bundle

logger = logging.getLogger(__name__)

AUTOSTOPPED = "stopped by autostop"


@dataclass(frozen=True)
class Cluster:
    """A cluster that was brought up: what a client needs to use it."""

    config: ClusterConfig
    head: Head
    bundle: Bundle
    created: float
    """Seconds since the epoch."""
    ended: str | None = None
    """Why nothing of it is there any more; None as long as something may be."""
    connect: Connect = field(default=connect, compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def folder(self) -> Path:
        return cluster_dir(self.name)

    @property
    def token_file(self) -> Path:
        return self.folder / "token"

    @property
    def http(self) -> RayHttp:
        """Raises PodlaunchError when there is no way to the head."""
        return RayHttp(self.head.url, self.token_file)

    def provider(self) -> TPUProvider:
        return TPUProvider.connect(self.config)

    def alive(self) -> bool:
        """Raises PodlaunchError when nobody can tell."""
        return self.ended is None and self.head.alive()

    def to_dict(self) -> dict[str, Any]:
        plain = {
            "config": self.config.to_dict(),
            "head": self.head.to_dict(),
            "bundle": self.bundle.to_dict(),
            "created": self.created,
        }
        return plain if self.ended is None else {**plain, "ended": self.ended}


@dataclass(frozen=True)
class Outside:
    """What bringing a cluster up asks of the world outside."""

    connect: Connect = connect
    make_bundle: Callable[[ClusterConfig, Progress], Bundle] = field(default_factory=lambda: _make_bundle)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def find(name: str, connect: Connect = connect) -> Cluster | None:
    """The cluster of that name that this machine knows, alive or not, or None when it knows none.

    Raises ClusterError when its record makes no sense to this version.
    """
    record = read_json(clusters_dir() / name / "cluster.json")
    if record is None:
        return None
    try:
        config, bundle = ClusterConfig.from_dict(record["config"]), Bundle.from_dict(record["bundle"])
    except ConfigError as error:
        raise ClusterError(f"cluster {name!r} was made by {maker(record)}: {error}; end it with that version") from error
    head = _head_from(config, bundle, record["head"], connect)
    return Cluster(config, head, bundle, record["created"], record.get("ended"), connect)


def list_clusters() -> list[Cluster]:
    names = sorted(path.parent.name for path in clusters_dir().glob("*/cluster.json"))
    return [cluster for name in names if (cluster := find(name)) is not None]


def check_name(name: str, *, bare: bool) -> None:
    """Raises ClusterError when slices without Ray use the cluster's name, or, with `bare`, a cluster uses theirs: both would call the
    same slices their own.
    """
    if bare and (known := find(name)) is not None and known.ended is None:
        raise ClusterError(f"a cluster {name!r} is up; choose another name, or end it with `tpu stop {name}`")
    if not bare and bare_slices.find(name) is not None:
        raise ClusterError(f"slices without Ray called {name!r} are up; choose another cluster.name, or end them with `tpu stop {name}`")


def list_unended() -> list[Cluster]:
    """Those of which something may be there."""
    return [cluster for cluster in list_clusters() if cluster.ended is None]


def find_in_project(name: str, at: Where, connect: Connect = connect) -> Cluster | None:
    """A cluster that another machine made, found by its head VM in the project that `at` leads to. Nothing of it is kept here.

    Raises PodlaunchError.
    """
    return next((cluster for cluster in list_in_project(at, connect) if cluster.name == name), None)


def list_in_project(at: Where, connect: Connect = connect) -> list[Cluster]:
    """All clusters whose heads are VMs of the project that `at` leads to, whoever made them. Raises PodlaunchError."""
    from cluster.head import VmHead, find_heads, read_settings

    clusters = []
    for vm in find_heads(connect(at)):
        settings = read_settings(vm)
        head = VmHead(settings.config, settings.bundle, clusters_dir() / settings.config.name, vm.zone, connect)
        clusters.append(Cluster(settings.config, head, settings.bundle, vm.created, None, connect))
    return clusters


def adopt(cluster: Cluster) -> None:
    """Keep here what is needed to use a cluster that another machine made. Raises PodlaunchError when its token may not be read."""
    fetch_token(cluster.token_file, cluster.connect(cluster.config).secrets, cluster.name)
    _remember(cluster)


def running(config: ClusterConfig, connect: Connect = connect) -> Cluster | None:
    """The cluster of that name when it is up; asks the cloud, and wakes an emulated one up. Raises PodlaunchError."""
    cluster = find(config.name, connect)
    if cluster is None or cluster.ended is not None:
        return None
    if cluster.head.kind == "vm":
        _revive_cloud(cluster)
    return cluster if cluster.alive() else None


def check_versions(cluster: Cluster) -> None:
    """Raises ClusterError when the cluster runs another Ray, Python or podlaunch than this machine has."""
    found = disagreement(own_versions(), cluster.bundle.versions)
    if found is not None:
        here, there = found
        raise ClusterError(
            f"cluster {cluster.name!r} runs {there}, this machine has {here}; use an environment that has what the cluster runs, or end it "
            f"with `tpu stop {cluster.name}` and start it anew"
        )


def check_fits(cluster: Cluster, wanted: ClusterConfig) -> None:
    """Raises ClusterError when the running cluster cannot serve `wanted`, or does not agree with this machine (`check_versions`)."""
    check_versions(cluster)
    has = {node_type(kind): kind for kind in cluster.config.types}
    advice = f"choose another cluster.name, or end it with `tpu stop {cluster.name}`"
    for wants in wanted.types:
        kind = has.get(node_type(wants))
        if kind is None:
            there = ", ".join(has)
            raise ClusterError(f"cluster {cluster.name!r} is up with slices of {there}, this asks for {node_type(wants)}; {advice}")
        most = kind.effective_max_slices
        if wants.slices > most:
            raise ClusterError(
                f"cluster {cluster.name!r} is up with at most {most} slices of {node_type(kind)}, this asks for {wants.slices}; {advice}"
            )
    if missing := sorted(set(wanted.existing) - set(cluster.config.existing)):
        raise ClusterError(f"cluster {cluster.name!r} is up without the existing slices {', '.join(missing)}; {advice}")
    has_stop, wants_stop = cluster.config.autostop, wanted.autostop
    if wants_stop is not None and (has_stop is None or parse_duration(has_stop) != parse_duration(wants_stop)):
        has_words = "without autostop" if has_stop is None else f"with autostop {has_stop}"
        raise ClusterError(f"cluster {cluster.name!r} is up {has_words}, this asks for {wants_stop}; {advice}")


def up(
    config: ClusterConfig,
    progress: Progress,
    *,
    companion: Sequence[str] = (),
    outside: Outside | None = None,
) -> Cluster:
    """The cluster of `config`, brought up when it is not. Two callers at once get the same one. A head of this machine that died is started
    again where it was, with its slices; in place of a head VM that is gone all is made anew, but for what runs were given.

    `companion`: what a head that is started now keeps alive beside Ray (cluster/vm/companion.py), arguments of Python.

    Raises ClusterError when it cannot be brought up, or is up and cannot serve `config`.
    """
    outside = outside or Outside()
    with _exclusive(config.name):
        check_name(config.name, bare=False)
        known = find(config.name, outside.connect)
        if known is not None and known.ended is not None:
            _forget(known)
            known = None
        bundle = bundle_hash() if known is None else known.bundle.hash
        config = _with_cloud(config, bundle, progress)
        if known is None and config.effective_head == "vm":
            known = find_in_project(config.name, config, outside.connect)
            if known is not None and known.alive():
                check_fits(known, config)
                progress(f"cluster {config.name!r} was brought up on another machine: joining it")
                adopt(known)
        if known is not None and known.alive():
            check_fits(known, config)
            if known.bundle.hash != bundle_hash():
                words = "runs bring their own, head and hosts keep what they have until it is stopped"
                progress(f"cluster {known.name!r} was brought up with other code of the same version of podlaunch: {words}")
            _wait_until_ready(known, outside)
            _attach(known, progress)
            return known
        if known is not None and isinstance(known.head, HereHead):
            check_fits(known, config)
            progress(f"the head of cluster {config.name!r} is gone: starting it again for the slices that are there")
            return _start_again(known, known.head, companion, progress, outside)
        if known is not None:
            progress(f"the head of cluster {config.name!r} is gone: cleaning up after it")
            _remove(known, progress, for_good=False)
        cluster = _start(config, companion, progress, outside)
        _attach(cluster, progress)
        return cluster


def stop(cluster: Cluster, progress: Progress, *, because: str | None = None) -> None:
    """End the cluster: its head, its slices, its secrets, and the emulated cloud when nothing else uses it.

    `because`: what its record says from now on; None: there is no record any more. Raises ClusterError when something is left.
    """
    with _exclusive(cluster.name):
        now = find(cluster.name, cluster.connect)  # another command may have been faster
        cluster_dir(cluster.name)  # one that another machine made has none here
        if now is None or now.ended is None:
            _remove(cluster, progress)
        _forget(cluster)
        if because is not None:
            _remember(dataclasses.replace(cluster, ended=f"{because} {time.strftime('%Y-%m-%d %H:%M:%S')}"))
        if cluster.config.cloud == "emulated" and not cluster.config.existing:  # which would end with it, and are not ours to end
            _stop_unused_cloud(progress)


def notice_autostop(cluster: Cluster) -> Cluster:
    """A head VM that ended its cluster cannot write here. It is known by what is left: neither VM nor token, which only an end in order
    deletes. Returns the cluster as it is; raises PodlaunchError when the cloud does not answer.
    """
    if cluster.ended is not None or cluster.head.kind != "vm" or cluster.config.autostop is None or cluster.head.alive():
        return cluster
    if cluster.connect(cluster.config).secrets.list({OWNER_LABEL: cluster.name}):
        return cluster
    cluster.head.let_go()
    ended = dataclasses.replace(cluster, ended=f"{AUTOSTOPPED}, seen {time.strftime('%Y-%m-%d %H:%M:%S')}")
    _remember(ended)
    return ended


def reach_cloud(config: ClusterConfig) -> ClusterConfig:
    """`config` with the addresses of its cloud's services; an emulated cloud is started where it does not run. Raises ClusterError."""
    known = find(config.name)
    return _with_cloud(config, bundle_hash() if known is None else known.bundle.hash, lambda _: None)


def _with_cloud(config: ClusterConfig, bundle: str, progress: Progress) -> ClusterConfig:
    """The emulated cloud of this machine is started where it does not run, at its old address; it comes back with its nodes."""
    if config.cloud != "emulated":
        return config
    if local.emulator_status() is None:
        progress("starting the emulated cloud")
    return local.with_local_endpoints(config, bundle)


def _start_again(known: Cluster, head: HereHead, companion: Sequence[str], progress: Progress, outside: Outside) -> Cluster:
    """A head of this machine whose agent died. What it left running is taken over; hosts find Ray where it was."""
    config = _with_cloud(known.config, known.bundle.hash, progress)
    cluster = dataclasses.replace(known, config=config, head=head.again(config, companion))
    _remember(cluster)
    cluster.head.start(progress)
    _wait_until_ready(cluster, outside)
    _attach(cluster, progress)
    return cluster


def _start(config: ClusterConfig, companion: Sequence[str], progress: Progress, outside: Outside) -> Cluster:
    bundle = outside.make_bundle(config, progress)
    connect = outside.connect
    if config.existing:
        existing.check(TPUProvider.connect(config))  # before anything is started
    cluster = Cluster(config, _plan_head(config, bundle, connect, companion), bundle, time.time(), None, connect)
    # Recorded before anything is created: whatever happens next, the next start or stop finds it.
    _remember(cluster)
    make_token(cluster.token_file)
    if not config.shares_files:
        share_token(cluster.token_file, connect(config).secrets, config)
    cluster.head.start(progress)
    _wait_until_ready(cluster, outside)
    return cluster


def _make_bundle(config: ClusterConfig, progress: Progress) -> Bundle:
    """What VMs install is put into the cluster's bucket; VMs of this machine need none, their image holds it. Raises PodlaunchError."""
    if config.bucket is not None:
        return Bundle(bundle_hash(), ensure_bundle(config, progress), own_versions())
    if config.cloud != "emulated":
        words = "VMs install what they run from a bucket: give cluster.bucket=<name>, or set PODLAUNCH_BUCKET"
        raise ConfigError(f"cluster {config.name!r} has no bucket; {words}")
    return Bundle(bundle_hash(), versions=own_versions())


def _attach(cluster: Cluster, progress: Progress) -> None:
    """Let the slices join that were made elsewhere. When that fails the cluster is up without them; the next `tpu start` tries again."""
    if not cluster.config.existing:
        return
    progress("letting the existing slices join")
    settings = host_settings(cluster.config, cluster.head.ray_address, token_place(cluster.config, cluster.folder))
    joined = [node.slice_name for node in cluster.http.nodes() if node.alive]
    existing.attach(cluster.provider(), settings, startup_script(cluster.bundle.hash, cluster.bundle.location), joined)


def _plan_head(config: ClusterConfig, bundle: Bundle, connect: Connect, companion: Sequence[str]) -> Head:
    folder = cluster_dir(config.name)
    if config.effective_head == "vm":
        from cluster.head import VmHead

        return VmHead.plan(config, bundle, folder, connect, companion)
    return HereHead.plan(config, bundle, folder, companion)


def _head_from(config: ClusterConfig, bundle: Bundle, values: dict[str, Any], connect: Connect) -> Head:
    folder = cluster_dir(config.name)
    if values["kind"] == "vm":
        from cluster.head import VmHead

        return VmHead(config, bundle, folder, values["zone"], connect)
    return HereHead.from_dict(config, bundle, folder, values)


def _wait_until_ready(cluster: Cluster, outside: Outside) -> None:
    limit = cluster.head.ready_limit_s
    deadline = outside.clock() + limit
    pause = 0.2
    while (reason := _not_ready(cluster)) is not None:
        if not cluster.alive():
            raise ClusterError(f"the head of cluster {cluster.name!r} ended while it started; {cluster.head.log_hint}")
        if outside.clock() > deadline:
            raise ClusterError(
                f"the head of cluster {cluster.name!r} does not answer after {limit:.0f} s: {reason}; {cluster.head.log_hint}"
            )
        outside.sleep(pause)
        pause = min(2.0, pause * 1.1)


def _not_ready(cluster: Cluster) -> str | None:
    """Why no job can be submitted yet, or None. Raises what waiting does not cure."""
    try:
        return None if cluster.http.answers() else "Ray is not up"
    except TunnelError as error:
        if not error.passing:
            raise
        return str(error)


def _revive_cloud(cluster: Cluster) -> None:
    """An emulated service that crashed comes back with its nodes, at the same address."""
    if cluster.config.cloud == "emulated":
        local.with_local_endpoints(cluster.config, cluster.bundle.hash)


def _remove(cluster: Cluster, progress: Progress, *, for_good: bool = True) -> None:
    """Everything but the record, and not `for_good` but what runs were given, which go on on the next head. Raises ClusterError when
    something is left; the record leads the next try there.
    """
    _revive_cloud(cluster)
    if cluster.config.existing:
        existing.detach(cluster.provider(), progress)
    # The head first, else its autoscaler makes the slices again that are being deleted.
    cluster.head.stop(progress)
    progress("deleting the slices")
    cluster.provider().stop()
    if cluster.config.shares_files:
        return
    progress("deleting the secrets")
    services = cluster.connect(cluster.config)
    if not for_good:
        services.secrets.delete(secret_name(cluster.name))
        return
    delete_secrets(services.secrets, cluster.name)
    left = services.secrets.list({OWNER_LABEL: cluster.name})
    if cluster.head.kind == "vm":
        left += [one.name for one in services.instances.list({OWNER_LABEL: cluster.name})]
    if left:
        raise ClusterError(f"of cluster {cluster.name!r} is left: {', '.join(left)}; run `tpu stop {cluster.name}` again")


def _stop_unused_cloud(progress: Progress) -> None:
    configs = [cluster.config for cluster in list_unended()] + [one.config for one in bare_slices.list_bare()]
    if not any(config.cloud == "emulated" for config in configs) and local.stop_emulator():
        progress("the emulated cloud is stopped")


def _remember(cluster: Cluster) -> None:
    write_atomic(cluster.folder / "cluster.json", json.dumps(cluster.to_dict(), indent=1))


def _forget(cluster: Cluster) -> None:
    shutil.rmtree(clusters_dir() / cluster.name)


@contextlib.contextmanager
def _exclusive(name: str) -> Iterator[None]:
    """One starter or stopper of a cluster at a time."""
    handle = os.open(clusters_dir() / f".{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
