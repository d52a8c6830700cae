"""`tpu dashboard`: the way to Ray's dashboard of a cluster."""

from typing import Annotated

import typer

from cluster import clusters
from cluster.errors import ClusterError
from launcher.cli.options import CONSOLE
from launcher.cli.stop import which


def dashboard(
    name: Annotated[str | None, typer.Argument(help="The cluster; needed only when there are several.")] = None,
    show_token: Annotated[bool, typer.Option("--show-token", help="Print the token as well.")] = False,
) -> None:
    """Open the way to a cluster's dashboard and say how to log in."""
    cluster = which(name)
    if cluster is None:
        raise ClusterError("no cluster is up; bring one up with `tpu start`")
    if not cluster.alive():
        raise ClusterError(f"the head of cluster {cluster.name!r} is gone; bring it up again with: tpu start {cluster.name}")
    if clusters.find(cluster.name) is None:
        clusters.adopt(cluster)
    CONSOLE.print(cluster.head.url, highlight=False, soft_wrap=True)
    token = cluster.token_file.read_text(encoding="utf-8").strip() if show_token else f"in {cluster.token_file} (--show-token prints it)"
    # Ray's page asks for it once and keeps it in a cookie of that address, which no script can read.
    CONSOLE.print(f"open it in a browser; it asks for the authentication token: {token}", highlight=False, soft_wrap=True, markup=False)
