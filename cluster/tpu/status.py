"""What there is now, for whoever looks at it."""

from dataclasses import dataclass

from cluster.tpu.lifecycle import BILLED, Life
from cluster.tpu.slices import ClusterSlice


@dataclass(frozen=True)
class SliceStatus:
    name: str
    zone: str
    state: str
    """As the API names it: the node's state, or the queued resource's while there is no node."""
    life: Life
    accelerator_type: str
    hosts: tuple[str, ...]
    health: str
    age_seconds: float
    usd_per_hour: float | None
    """Estimated list price now; 0 while it is not billed, None when the catalogue has no price."""
    reason: str | None = None
    """Why it is LOST."""
    existing: bool = False
    """It was made elsewhere and is never deleted."""


@dataclass(frozen=True)
class TPUStatus:
    name: str
    slices: tuple[SliceStatus, ...]
    wanted: int
    """How many slices the configuration asks for."""

    @property
    def ready(self) -> bool:
        return sum(item.life is Life.READY for item in self.slices) >= self.wanted

    @property
    def usd_per_hour(self) -> float:
        """What the slices cost together now, those without a price left out."""
        return sum(item.usd_per_hour or 0.0 for item in self.slices)


def slice_status(item: ClusterSlice, now: float) -> SliceStatus:
    """`now`: seconds since the epoch."""
    return SliceStatus(
        name=item.name,
        zone=item.zone,
        state=item.state,
        life=item.life,
        accelerator_type=item.accelerator_type,
        hosts=item.hosts,
        health=item.health,
        age_seconds=max(0.0, now - item.created),
        usd_per_hour=item.usd_per_hour if item.life in BILLED else 0.0,
        reason=item.failure.words if item.life is Life.LOST else None,
    )
