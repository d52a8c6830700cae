"""The slice that a name means: its own, or that of a cluster which has only one."""

from cluster import bare, clusters
from cluster.config import ClusterConfig
from cluster.errors import ClusterError, ConfigError, PodlaunchError
from cluster.tpu.lifecycle import Life
from cluster.tpu.provider import TPUProvider
from cluster.tpu.slices import ClusterSlice, best_first
from launcher.cli.places import clusters_elsewhere

_PATIENCE_S = 10.0


def slice_named(name: str) -> tuple[ClusterConfig, ClusterSlice]:
    """The slice, READY, and the cluster or the slices without Ray that it is of; also of a cluster that another machine made.

    Raises PodlaunchError when no slice is meant, several are, or it is not READY.
    """
    known = [cluster.config for cluster in clusters.list_unended()] + [one.config for one in bare.list_bare()]
    problems: list[str] = []
    found = _find(name, known, problems) or _find(name, [one.config for one in clusters_elsewhere(problems.append)], problems)
    if found is None:
        names = ", ".join(config.name for config in known) or "none"
        raise ClusterError("; ".join([f"there is no slice or cluster {name!r}; up: {names}", *problems, "see `tpu status`"]))
    _, item = found
    if item.life is not Life.READY:
        raise ClusterError(f"slice {item.name!r} in {item.zone} is {item.state}; only a READY one can be reached, see `tpu status`")
    return found


def check_host(item: ClusterSlice, host: int) -> None:
    """Raises ConfigError when the slice has no such host."""
    if host >= len(item.hosts):
        raise ConfigError(f"--host {host}: slice {item.name!r} has {len(item.hosts)} hosts, 0 to {len(item.hosts) - 1}")


def _find(name: str, configs: list[ClusterConfig], problems: list[str]) -> tuple[ClusterConfig, ClusterSlice] | None:
    for config in configs:
        if config.name == name:
            return config, _only(config)
    for config in configs:
        try:
            found = [item for item in _slices(config) if item.name == name]
        except PodlaunchError as error:
            problems.append(str(error))
            continue
        if found:
            return config, best_first(found)[0]
    return None


def _only(config: ClusterConfig) -> ClusterSlice:
    slices = _slices(config)
    if not slices:
        raise ClusterError(f"{config.name!r} has no slices; a run brings them, or `tpu start --slices 1`")
    if len(slices) > 1:
        names = ", ".join(sorted(item.name for item in slices))
        raise ClusterError(f"{config.name!r} has {len(slices)} slices, name one: {names}")
    return slices[0]


def _slices(config: ClusterConfig) -> list[ClusterSlice]:
    provider = TPUProvider.connect(config, patience=_PATIENCE_S)
    slices = [*provider.list_slices(), *provider.existing_slices()]
    return [item for item in slices if item.life not in (Life.DELETING, Life.GONE)]
