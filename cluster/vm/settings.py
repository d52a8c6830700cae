"""What a host must know to join its cluster. Travels as metadata of the node, so it names secrets and holds none."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.secret_place import SecretPlace


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

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HostSettings":
        return cls(**{**values, "token": SecretPlace.from_dict(values["token"])})
