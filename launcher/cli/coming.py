"""The slices of a cluster on their way: a line for every change of a slice or of how many of its hosts have joined."""

import time
from collections import Counter
from collections.abc import Callable, Collection

from cluster.clusters import Cluster
from cluster.errors import ClusterError, PodlaunchError
from cluster.tpu.lifecycle import Life
from cluster.tpu.refusals import read_refusals

LOOK_S = 1.0
_HEAD_LOST_S = 60.0


def wait_for_slices(
    cluster: Cluster,
    wanted: int,
    say: Callable[[str], None],
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return when `wanted` slices are READY with all hosts in Ray. Waits for as long as it takes: capacity may come in hours.

    Raises ClusterError when the head is gone; a cloud or a head that stumbles for less than a minute is passed over.
    """
    told: set[str] = set()
    answered = clock()
    while True:
        try:
            whole, lines = _look(cluster)
            answered = clock()
        except PodlaunchError as error:
            if clock() - answered > _HEAD_LOST_S or not cluster.alive():
                raise ClusterError(f"cluster {cluster.name!r} cannot be watched any more: {error}; look with `tpu status`") from error
            whole, lines = 0, []
        for line in lines:
            if line not in told:
                say(line)
        told = set(lines) if lines else told
        if whole >= wanted:
            return
        sleep(LOOK_S)


def _look(cluster: Cluster) -> tuple[int, Collection[str]]:
    """How many slices are whole, and what there is to tell of each, and of what was refused."""
    joined = Counter(node.slice_name for node in cluster.http.nodes() if node.alive)
    whole, lines = 0, []
    for one in cluster.provider().get_status().slices:
        hosts, total = joined[one.name], cluster.config.type_like(one.accelerator_type).hosts_per_slice
        whole += one.life is Life.READY and hosts >= total
        lines.append(f"{one.name}: {one.state} in {one.zone}, {hosts} of {total} hosts" + (f" ({one.reason})" if one.reason else ""))
    # The seconds to the next try are another text at each look.
    return whole, [*lines, *(line.partition(", next try")[0] for line in read_refusals(cluster.name)[1])]
