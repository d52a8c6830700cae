"""Agreement between the processes of one run. With one process every function here is immediate.

All functions are collective: every process must call them in the same order.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils

from cluster.errors import PodlaunchError

TEXT_BYTES = 500


def is_main() -> bool:
    """Whether this is process 0, the one that decides and writes what is written once."""
    return jax.process_index() == 0


def from_main(value: int) -> int:
    """Process 0's value, on every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def first_text(mine: str | None) -> str | None:
    """The text of the first process that has one, on every process, cut to TEXT_BYTES; None when none has."""
    if jax.process_count() == 1:
        return mine
    sent = np.zeros(TEXT_BYTES, np.uint8)
    content = np.frombuffer((mine or "").encode()[:TEXT_BYTES], np.uint8)
    sent[: len(content)] = content
    gathered = np.asarray(multihost_utils.process_allgather(sent))
    texts = [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in gathered]
    return next((text for text in texts if text), None)


def wait_for_all(name: str) -> None:
    """Return when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def check_same(what: str, digest: str) -> None:
    """Raises PodlaunchError on every process when their hexadecimal digests are not all the same."""
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(bytes.fromhex(digest), np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(mine))
    different = [i for i in range(len(gathered)) if not np.array_equal(gathered[i], gathered[0])]
    if different:
        raise PodlaunchError(
            f"{what} differs between host 0 and host {', '.join(map(str, different))}; give all hosts the same files and the same Python"
        )
