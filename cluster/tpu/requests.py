"""From a configuration to the exact requests that make its slices."""

import re
from collections.abc import Mapping
from typing import Any

from cluster.config import TPUConfig
from cluster.tpu.messages import NodeRequest, QueuedRequest, raw, to_node, to_queued_resource
from cluster.tpu.startup import with_commands

# What looks like a secret although it should not be in a startup command: assignments to such names, and the tokens of well-known services.
_SECRETS = (
    re.compile(
        r"(?i)(\b[A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL)[A-Z0-9_]*\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s;&|\"']+)"
    ),
    re.compile(r"()\b(hf_[A-Za-z0-9]{8,}|gh[pousr]_[A-Za-z0-9]{8,}|ya29\.[-_A-Za-z0-9]+|AIza[-_A-Za-z0-9]{20,})"),
)
REDACTED = "<redacted>"


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
