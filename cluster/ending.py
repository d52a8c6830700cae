"""`python -m cluster.ending NAME`: end a cluster whose head is on this machine, for its autostop.

A process apart from the head, which it ends first, on the same way as `tpu stop`.
"""

import logging
import sys

from cluster import clusters
from cluster.logs import set_up_logging

logger = logging.getLogger(__name__)


def main() -> None:
    name = sys.argv[1]
    set_up_logging(f"ending-{name}", terminal=None)
    cluster = clusters.find(name)
    if cluster is None or cluster.ended is not None:
        return  # somebody was faster
    clusters.stop(cluster, logger.info, because=clusters.AUTOSTOPPED)


if __name__ == "__main__":
    main()
