"""The life of a slice: what the states that the API reports for its node and its queued resource mean to us, and what we do about it.

         create                          delete
GONE ---------> PENDING ----> READY ------------> DELETING --> GONE
                   |            | \\--> INTERRUPTED --> READY, or LOST when it takes too long
                   \\------------+-----> LOST: what is left of it stays, and eats quota, until it is deleted
"""

import enum
from dataclasses import dataclass


class Life(enum.Enum):
    """Where a slice is in its life."""

    PENDING = "pending"
    """It is being made or waits for capacity; it costs nothing yet."""
    READY = "ready"
    """Its hosts run, and it is billed."""
    INTERRUPTED = "interrupted"
    """The service works on it (maintenance, repair); it may come back by itself, so it is lost only after a while."""
    LOST = "lost"
    """It does not come back; what is left of it has to be deleted."""
    DELETING = "deleting"
    GONE = "gone"
    """There is no such node and no such queued resource."""


class Queue(enum.Enum):
    """Where a queued resource is in its life."""

    NONE = "none"
    """There is none: a plain node, or nothing at all."""
    WAITING = "waiting"
    SERVED = "served"
    DEAD = "dead"
    """It will not be served, or not any more, and keeps eating quota."""
    DELETING = "deleting"


class Action(enum.Enum):
    CREATE = "create"
    WAIT = "wait"
    KEEP = "keep"
    REPLACE = "replace"
    """Delete what is left; when it is gone, create."""
    DELETE = "delete"
    NOTHING = "nothing"


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
# Keys: google.cloud.tpu.v2.QueuedResourceState.State.
QUEUE_OF_STATE = {
    "STATE_UNSPECIFIED": Queue.WAITING,
    "CREATING": Queue.WAITING,
    "ACCEPTED": Queue.WAITING,
    "WAITING_FOR_RESOURCES": Queue.WAITING,
    "PROVISIONING": Queue.WAITING,
    "ACTIVE": Queue.SERVED,
    "SUSPENDING": Queue.DEAD,  # its nodes are being taken away, and it is not served a second time
    "SUSPENDED": Queue.DEAD,
    "FAILED": Queue.DEAD,
    "DELETING": Queue.DELETING,
}
_COLUMNS = (Queue.NONE, Queue.WAITING, Queue.SERVED, Queue.DEAD, Queue.DELETING)
# One row for each life of the node, one column for each life of the queued resource. Queued resources have to be listed before nodes:
# then one that shows as SERVED without a node has lost it (a node that is merely younger than the first listing would show in the second).
_MERGED: dict[Life, tuple[Life, ...]] = {
    #                  NONE              WAITING           SERVED            DEAD       DELETING
    Life.GONE: (Life.GONE, Life.PENDING, Life.LOST, Life.LOST, Life.DELETING),
    Life.PENDING: (Life.PENDING, Life.PENDING, Life.PENDING, Life.LOST, Life.DELETING),
    Life.READY: (Life.READY, Life.READY, Life.READY, Life.LOST, Life.DELETING),
    Life.INTERRUPTED: (Life.INTERRUPTED, Life.INTERRUPTED, Life.INTERRUPTED, Life.LOST, Life.DELETING),
    Life.LOST: (Life.LOST, Life.LOST, Life.LOST, Life.LOST, Life.DELETING),
    # A node that somebody deletes leaves a queued resource behind, which has to go as well.
    Life.DELETING: (Life.DELETING, Life.LOST, Life.LOST, Life.LOST, Life.DELETING),
}


@dataclass(frozen=True)
class Step:
    """What follows from where a slice is."""

    life: Life
    wanted: Action
    """While the slice is wanted."""
    unwanted: Action


_ACTIONS: dict[Life, tuple[Action, Action]] = {
    Life.GONE: (Action.CREATE, Action.NOTHING),
    Life.PENDING: (Action.WAIT, Action.DELETE),
    Life.READY: (Action.KEEP, Action.DELETE),
    Life.INTERRUPTED: (Action.KEEP, Action.DELETE),
    Life.LOST: (Action.REPLACE, Action.DELETE),
    Life.DELETING: (Action.WAIT, Action.WAIT),
}
_NODES = dict[str | None, Life]([(None, Life.GONE), *LIFE_OF_STATE.items()])
_QUEUES = dict[str | None, Queue]([(None, Queue.NONE), *QUEUE_OF_STATE.items()])
TRANSITIONS: dict[tuple[str | None, str | None], Step] = {
    (node, queue): Step(life, *_ACTIONS[life])
    for node in _NODES
    for queue in _QUEUES
    for life in (_MERGED[_NODES[node]][_COLUMNS.index(_QUEUES[queue])],)
}
"""The whole table: (state of the node, state of the queued resource; None where there is none) -> what follows."""

WAITS_FOR_CAPACITY = frozenset({"ACCEPTED", "WAITING_FOR_RESOURCES"})
"""States of a queued resource (without a node) in which only the zone's capacity is missing, so that another zone may help."""

BILLED = frozenset({Life.READY, Life.INTERRUPTED})
"""A node is billed while it is READY; in maintenance we count it as well, so that an estimate is never too low."""

INTERRUPTED_LIMIT_S = 1800.0
"""A repair or restart that takes longer is given up; hosts come back in minutes."""
ACCEPTING_LIMIT_S = 600.0
"""A queued resource is accepted or refused within seconds; one that still shows as CREATING after this is given up."""
DELETING_LIMIT_S = 900.0
"""A deletion that takes longer is asked for again."""


def step(node: str | None, queue: str | None) -> Step:
    """What follows from the states of the API. One that a later API adds counts as INTERRUPTED, or as waiting in the queue."""
    node_key = node if node is None or node in LIFE_OF_STATE else "UNKNOWN"
    queue_key = queue if queue is None or queue in QUEUE_OF_STATE else "STATE_UNSPECIFIED"
    return TRANSITIONS[node_key, queue_key]


def provisioning_limit(hosts: int) -> float:
    """Seconds that `hosts` hosts may take from the request to READY once capacity is granted.

    600, 900 from 64 on, 1800 from 256: what marin-community/marin came to use for nodes.
    """
    return 600.0 if hosts < 64 else 900.0 if hosts < 256 else 1800.0
