"""What a host must know to join its cluster. Travels as metadata of the node, so it names secrets and holds none."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.secret_place import SecretPlace
from cluster.versions import Versions

SETTINGS_VARIABLE = "PODLAUNCH_HOST_SETTINGS"
"""Holds the settings on a host whose metadata is not ours: a TPU VM that was made elsewhere."""
SPOT_NOTICE_S = 30.0
STANDARD_NOTICE_S = 120.0
"""From the notice to the end of the VM: Compute Engine's ACPI G2 to G3 (Scheduling.skipGuestOsShutdown)."""


@dataclass(frozen=True)
class HostSettings:
    """Written by the node provider, read by the host agent."""

    cluster: str
    head_address: str
    """host:port of Ray's head."""
    token: SecretPlace
    """Where the cluster's Ray token is."""
    node_type: str
    """Ray's name for this kind of slice."""
    slice_resource: str
    """The custom resource that worker 0 carries, so that spot and on-demand slices of one type are told apart."""
    chips_per_host: int
    endpoint: str | None = None
    """host:port of a plaintext Cloud TPU API; None: Google's own."""
    storage_endpoint: str | None = None
    """URL of a Cloud Storage API; None: Google's own."""
    owned: bool = True
    """Whether podlaunch made the slice, and may delete it; one that the user made never deletes itself."""
    spot: bool = False
    head_lost_grace_s: float = 1800.0
    """Seconds without the head after which the slice deletes itself."""
    versions: Versions | None = None
    """What the head runs, which the host has to run too."""

    @property
    def notice_s(self) -> float:
        """Seconds from the notice of a preemption or of maintenance to the end of the VM."""
        return SPOT_NOTICE_S if self.spot else STANDARD_NOTICE_S

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HostSettings":
        versions = values.get("versions")
        own = {"token": SecretPlace.from_dict(values["token"]), "versions": None if versions is None else Versions(**versions)}
        return cls(**{**values, **own})
