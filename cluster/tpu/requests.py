"""From a configuration to the exact requests that make its slices."""

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.config import TPUConfig
from cluster.tpu.messages import NodeRequest, QueuedRequest, raw, to_node, to_queued_resource
from cluster.tpu.slices import CREATOR_LABEL, OWNER_LABEL, ROLE_LABEL, TYPE_LABEL, VERSION_LABEL
from cluster.tpu.startup import with_commands

# What looks like a secret although it should not be in a startup command: assignments to such names, and the tokens of well-known services.
_SECRETS = (
    re.compile(
        r"(?i)(\b[A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL)[A-Z0-9_]*\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s;&|\"']+)"
    ),
    re.compile(r"()\b(hf_[A-Za-z0-9]{8,}|gh[pousr]_[A-Za-z0-9]{8,}|ya29\.[-_A-Za-z0-9]+|AIza[-_A-Za-z0-9]{20,})"),
)
REDACTED = "<redacted>"


def slice_names(config: TPUConfig) -> list[str]:
    """The names of the slices of one run, or of a cluster without Ray."""
    return [f"{config.name}-{index}" for index in range(config.slices)]


def owner_labels(config: TPUConfig, owner: str) -> dict[str, str]:
    """The labels by which every slice of a cluster is known."""
    mine = {
        OWNER_LABEL: config.name,
        VERSION_LABEL: _label_value(importlib.metadata.version("podlaunch")),
        TYPE_LABEL: _label_value(config.accelerator.name),
    }
    return {**mine, CREATOR_LABEL: owner} if owner else mine


def role_labels(config: TPUConfig, owner: str, role: str) -> dict[str, str]:
    """The labels of what a cluster has beside its slices."""
    return {**config.labels, **owner_labels(config, owner), ROLE_LABEL: role}


def plan(config: TPUConfig, names: Sequence[str], *, owner: str, metadata: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """The requests that make slices `names` when nothing is there and the first zone refuses none, as REST would carry them, secrets
    redacted. Needs no connection and no credentials.
    """
    labels = {**config.labels, **owner_labels(config, owner)}
    return [as_json(config, config.effective_zones[0], node_request(config, name, labels, metadata or {})) for name in names]


def node_request(config: TPUConfig, name: str, labels: Mapping[str, str], metadata: Mapping[str, str]) -> NodeRequest:
    """What is asked for the slice `name`; `labels` are complete, `metadata` gets the user's startup commands."""
    values = dict(metadata)
    script = with_commands(values.get("startup-script", ""), config.startup_commands)
    if script:
        values["startup-script"] = script
    return NodeRequest(
        node_id=name,
        accelerator=config.accelerator,
        runtime_version=config.effective_runtime_version,
        labels=dict(labels),
        metadata=values,
        tags=tuple(config.tags),
        network=config.network,
        subnetwork=config.subnetwork,
        external_ips=config.external_ips,
        service_account=config.service_account,
        spot=config.provisioning == "spot",
        reserved=config.provisioning == "reserved",
        disks=tuple(config.disks),
    )


def queued_request(config: TPUConfig, zone: str, node: NodeRequest) -> QueuedRequest:
    """The queued resource around a node. Only it can name a reservation: the v2 node has no field for one."""
    reservation = config.reservation
    if reservation is not None and "/" not in reservation:
        reservation = f"projects/{config.effective_project}/locations/{zone}/reservations/{reservation}"
    return QueuedRequest(node, config.valid_until_seconds, reservation)


def as_json(config: TPUConfig, zone: str, node: NodeRequest) -> dict[str, Any]:
    """The request as REST would carry it, ready to be printed: whatever looks like a secret is redacted."""
    from google.protobuf import json_format

    parent = f"projects/{config.effective_project}/locations/{zone}"
    if config.queued_resource:
        place = f"{parent}/queuedResources?queuedResourceId={node.node_id}"
        message = raw(to_queued_resource(parent, queued_request(config, zone, node)))
    else:
        place = f"{parent}/nodes?nodeId={node.node_id}"
        message = raw(to_node(node))
    return {"method": "POST", "path": f"/v2/{place}", "body": redacted(json_format.MessageToDict(message))}


def redacted(value: Any) -> Any:
    """Plain data with everything that looks like a secret replaced."""
    if isinstance(value, dict):
        return {key: redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redacted(item) for item in value]
    if isinstance(value, str):
        for pattern in _SECRETS:
            value = pattern.sub(lambda found: f"{found[1]}{REDACTED}", value)
    return value


def _label_value(text: str) -> str:
    """`text` as Google allows it in a label's value."""
    return re.sub(r"[^-_a-z0-9]", "-", text.lower())[:63]
