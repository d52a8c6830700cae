"""Why a host is gone without a word: what the node provider beside us on the head has seen of its slice."""

import time
from collections.abc import Callable, Sequence

from cluster.tpu.losses import read_losses

WAIT_S = 10.0
"""For a listing that is younger than the loss; one comes every two seconds."""


def taken_slice(
    cluster: str,
    slices: Sequence[str],
    *,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """What the cloud did to one of `slices`, in words; empty when it took none of them. Waits for a listing that begins after this call.

    `clock`: seconds since the epoch.
    """
    asked = clock()
    while True:
        listed, lost = read_losses(cluster)
        for name in slices:
            if name in lost:
                return f"slice {name} became {lost[name]}"
        if listed >= asked or listed == 0.0 or clock() > asked + WAIT_S:
            return ""
        sleep(0.1)  # another process's file
