"""How long the emulated cloud takes for what."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """Seconds."""

    create: float = 0.0
    """From a node's acceptance until its hosts start; starting a stopped one takes as long."""
    delete: float = 0.0
    """From a deletion's (or a stop's) acceptance until the hosts end; of an instance as well."""
    provision: float = 0.0
    """How long an instance of Compute Engine stays PROVISIONING."""
    stage: float = 0.0
    """How long it stays STAGING, until its startup script runs."""
    accept: float = 0.0
    """From a queued resource's creation until it is ACCEPTED, which ends its operation."""
    queue: float = 0.0
    """How long a queued resource stays ACCEPTED even where there is capacity."""
    suspend: float = 0.0
    """How long a queued resource stays SUSPENDING."""
    notice: float = 30.0
    """From the notice of a preemption until the hosts end: 30 s for spot (Compute Engine's ACPI G2 to G3)."""
    maintenance: float = 60.0
    """How long a maintenance event lasts (a guess)."""


INSTANT = Profile()
# Guesses, within what public logs show: a small slice is READY one to two minutes after its request.
REALISTIC = Profile(create=60.0, delete=30.0, provision=3.0, stage=7.0, accept=2.0, queue=10.0, suspend=20.0, maintenance=600.0)
DEFAULT_PROFILE = "instant"
PROFILES = {DEFAULT_PROFILE: INSTANT, "realistic": REALISTIC}


def with_overrides(profile: Profile, **seconds: float | None) -> Profile:
    """`profile` with the delays that are given."""
    return dataclasses.replace(profile, **{name: value for name, value in seconds.items() if value is not None})
