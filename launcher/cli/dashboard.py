"""`tpu dashboard`: the way to Ray's dashboard of a cluster, and what Prometheus and Grafana need to show its runs."""

from pathlib import Path
from typing import Annotated

import typer

from cluster import clusters
from cluster.clusters import Cluster
from cluster.errors import ClusterError, ConfigError
from launcher.cli.options import CONSOLE
from launcher.cli.stop import which
from launcher.monitoring.files import write_monitoring


def dashboard(
    name: Annotated[str | None, typer.Argument(help="The cluster; needed only when there are several.")] = None,
    show_token: Annotated[bool, typer.Option("--show-token", help="Print the token as well.")] = False,
    monitoring: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write there what Prometheus and Grafana need to show the cluster's runs.")
    ] = None,
) -> None:
    """Open the way to a cluster's dashboard and say how to log in."""
    cluster = which(name)
    if cluster is None:
        raise ClusterError("no cluster is up; bring one up with `tpu start`")
    if not cluster.alive():
        raise ClusterError(f"the head of cluster {cluster.name!r} is gone; bring it up again with: tpu start {cluster.name}")
    if clusters.find(cluster.name) is None:
        clusters.adopt(cluster)
    if monitoring is not None:
        _write_monitoring(monitoring, cluster)
        return
    CONSOLE.print(cluster.head.url, highlight=False, soft_wrap=True)
    token = cluster.token_file.read_text(encoding="utf-8").strip() if show_token else f"in {cluster.token_file} (--show-token prints it)"
    # Ray's page asks for it once and keeps it in a cookie of that address, which no script can read.
    CONSOLE.print(f"open it in a browser; it asks for the authentication token: {token}", highlight=False, soft_wrap=True, markup=False)


def _write_monitoring(folder: Path, cluster: Cluster) -> None:
    try:
        write_monitoring(folder, cluster.name, cluster.head.url, cluster.token_file)
    except OSError as error:
        raise ConfigError(f"--monitoring: cannot write into {folder}: {error.strerror}; choose another folder") from error
    where = folder.absolute()
    for line in (
        f"prometheus --config.file={where}/prometheus.yml",
        f"GF_PATHS_PROVISIONING={where}/grafana/provisioning grafana server --homepath /usr/share/grafana",
    ):
        CONSOLE.print(line, highlight=False, soft_wrap=True, markup=False)
