"""The life of a Compute Engine instance as one table.

PROVISIONING -> STAGING -> RUNNING -> STOPPING -> TERMINATED (it is there and costs its disk until it is deleted)
      \\____________\\__________\\----> STOPPING -> gone
"""

import enum


class State(enum.StrEnum):
    """compute.v1.Instance.Status, as far as instances come here."""

    PROVISIONING = "PROVISIONING"
    STAGING = "STAGING"
    RUNNING = "RUNNING"
    STOPPING = "STOPPING"
    TERMINATED = "TERMINATED"


class Event(enum.Enum):
    """What happens to an instance."""

    ALLOCATE = "there is a machine for it"
    BOOT = "it boots"
    REFUSE = "there is no machine for it"
    DELETE = "it is to go"
    STOP = "the cloud takes its machine back"
    HALT = "its processes have ended"
    VANISH = "its processes have ended, and nobody needs it any more"


TRANSITIONS: dict[tuple[State, Event], State | None] = {
    (State.PROVISIONING, Event.ALLOCATE): State.STAGING,
    (State.PROVISIONING, Event.REFUSE): None,
    (State.STAGING, Event.BOOT): State.RUNNING,
    (State.RUNNING, Event.STOP): State.STOPPING,
    (State.STOPPING, Event.HALT): State.TERMINATED,
    (State.STOPPING, Event.VANISH): None,
    **{(state, Event.DELETE): State.STOPPING for state in State},
}
"""None: the object is gone."""
