"""The life of a slice: what every state that the API reports means to us.

         create                      delete
GONE ---------> PENDING --> READY ---------> DELETING --> GONE
                   |          |  \\--> INTERRUPTED --> READY, or LOST when it takes too long
                   \\----------+-----> LOST (preempted, stopped): the object stays until somebody deletes it
"""

import enum

from cluster.tpu.api import Slice


class Life(enum.Enum):
    """Where a slice is in its life."""

    PENDING = "pending"
    """It is being made; it costs nothing yet."""
    READY = "ready"
    """Its hosts run, and it is billed."""
    INTERRUPTED = "interrupted"
    """The service works on it (maintenance, repair); it may come back by itself, so it is lost only after a while."""
    LOST = "lost"
    """It does not come back; what is left of it has to be deleted."""
    DELETING = "deleting"
    GONE = "gone"
    """There is no such node."""


# Keys: google.cloud.tpu.v2.Node.State. A preempted node shows PREEMPTED as a rule; other states have been seen, too.
LIFE_OF_STATE = {
    "CREATING": Life.PENDING,
    "STARTING": Life.PENDING,
    "READY": Life.READY,
    "RESTARTING": Life.INTERRUPTED,
    "REIMAGING": Life.INTERRUPTED,
    "REPAIRING": Life.INTERRUPTED,
    "HIDING": Life.INTERRUPTED,
    "HIDDEN": Life.INTERRUPTED,
    "UNHIDING": Life.INTERRUPTED,
    "UNKNOWN": Life.INTERRUPTED,
    "STATE_UNSPECIFIED": Life.INTERRUPTED,
    "STOPPING": Life.LOST,
    "STOPPED": Life.LOST,
    "PREEMPTED": Life.LOST,
    "TERMINATED": Life.LOST,
    "DELETING": Life.DELETING,
}
BILLED = frozenset({Life.READY, Life.INTERRUPTED})
"""A node is billed while it is READY; in maintenance we count it as well, so that an estimate is never too low."""


def life(node: Slice | None) -> Life:
    """Where `node` (None: the API has no such node) is in its life. A state that a later API adds counts as INTERRUPTED."""
    return Life.GONE if node is None else LIFE_OF_STATE.get(node.state, Life.INTERRUPTED)
