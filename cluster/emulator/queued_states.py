"""The life of a queued resource as one table.

CREATING -> ACCEPTED -> (WAITING_FOR_RESOURCES) -> PROVISIONING -> ACTIVE -> SUSPENDING -> SUSPENDED
                \\________________|____________________|--> FAILED          reset: SUSPENDED, FAILED -> ACCEPTED
any of them -> DELETING -> gone
"""

import enum


class State(enum.IntEnum):
    """google.cloud.tpu.v2.QueuedResourceState.State"""

    CREATING = 1
    ACCEPTED = 2
    PROVISIONING = 3
    FAILED = 4
    DELETING = 5
    ACTIVE = 6
    SUSPENDING = 7
    SUSPENDED = 8
    WAITING_FOR_RESOURCES = 9


class Event(enum.Enum):
    """What happens to a queued resource."""

    ACCEPT = "the service takes the request"
    REFUSE = "the service gives up on the request"
    WAIT = "there is no capacity for it now"
    PROVISION = "there is capacity for all of its nodes"
    EXPIRE = "its time to wait is over"
    READY = "all of its nodes are READY"
    FAIL = "a node could not be made"
    LOSE = "a node was preempted or deleted"
    SUSPEND = "what it held is given back"
    RESET = "the user asks for another try"
    DELETE = "the user deletes it"
    VANISH = "none of its nodes is left"


TRANSITIONS: dict[tuple[State, Event], State | None] = {
    (State.CREATING, Event.ACCEPT): State.ACCEPTED,
    (State.CREATING, Event.REFUSE): State.FAILED,
    (State.ACCEPTED, Event.WAIT): State.WAITING_FOR_RESOURCES,
    (State.ACCEPTED, Event.PROVISION): State.PROVISIONING,
    (State.ACCEPTED, Event.EXPIRE): State.FAILED,
    (State.WAITING_FOR_RESOURCES, Event.PROVISION): State.PROVISIONING,
    (State.WAITING_FOR_RESOURCES, Event.EXPIRE): State.FAILED,
    (State.PROVISIONING, Event.READY): State.ACTIVE,
    (State.PROVISIONING, Event.FAIL): State.FAILED,
    (State.PROVISIONING, Event.LOSE): State.SUSPENDING,
    (State.ACTIVE, Event.LOSE): State.SUSPENDING,
    (State.SUSPENDING, Event.SUSPEND): State.SUSPENDED,
    (State.SUSPENDED, Event.RESET): State.ACCEPTED,
    (State.FAILED, Event.RESET): State.ACCEPTED,
    **{(state, Event.DELETE): State.DELETING for state in State if state is not State.DELETING},
    (State.DELETING, Event.VANISH): None,
}
"""None: the object is gone."""
BY_USER = frozenset({Event.DELETE, Event.RESET})
