"""Compute Engine's JSON: what an instance must say, and how the service shows it. Field names and values are those of compute/v1."""

import base64
import hashlib
import json
import re
from datetime import UTC, datetime
from typing import Any

from cluster.emulator.checks import INVALID_ARGUMENT
from cluster.emulator.instance_states import State
from cluster.emulator.model import Refusal, service_account

_ID = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_ZONE = re.compile(r"[a-z]+-[a-z]+[0-9]+-[a-z]")
_MACHINE_TYPE = re.compile(r"(?:.*/)?zones/([^/]+)/machineTypes/([^/]+)")
_LABEL = re.compile(r"[a-z][a-z0-9_-]{0,62}"), re.compile(r"[a-z0-9_-]{0,63}")
_MAX_LABELS = 64
_METADATA_VALUE_BYTES = 256 * 1024
_URL = "https://www.googleapis.com/compute/v1/"


def check_zone(zone: str) -> None:
    """Raises Refusal."""
    if not _ZONE.fullmatch(zone):
        raise _invalid("zone", zone, "Unknown zone.")


def check_instance(body: dict[str, Any], zone: str) -> None:
    """Raises Refusal."""
    name, machine = str(body.get("name", "")), str(body.get("machineType", ""))
    if not _ID.fullmatch(name):
        raise _invalid("resource.name", name, "Must be a match of regex '(?:[a-z](?:[-a-z0-9]{0,61}[a-z0-9])?)'")
    found = _MACHINE_TYPE.fullmatch(machine)
    if found is None:
        raise _invalid("resource.machineType", machine, "The URL is malformed.")
    if found.group(1) != zone:
        raise _invalid("resource.machineType", machine, f"The machine type must be in the zone of the instance, {zone}.")  # a guess
    if not body.get("disks"):
        raise _invalid("resource.disks", "", "No disks are specified.")
    if not body.get("networkInterfaces"):
        raise _invalid("resource.networkInterfaces", "", "At least one network interface is required.")
    _check_labels(body.get("labels", {}))
    _check_metadata({item["key"]: item.get("value", "") for item in body.get("metadata", {}).get("items", [])})


def shown(body: dict[str, Any], *, project: str, zone: str, ip: str, number: int, now: float) -> dict[str, Any]:
    """`body` as the service shows it from its acceptance on."""
    path = f"projects/{project}/zones/{zone}/instances/{body['name']}"
    machine = _MACHINE_TYPE.fullmatch(body["machineType"])
    assert machine is not None, "checked before"
    metadata = {"kind": "compute#metadata", **body.get("metadata", {})}
    return {
        **body,
        "kind": "compute#instance",
        "id": str(number),
        "creationTimestamp": timestamp(now),
        "status": State.PROVISIONING.value,
        "zone": url(f"projects/{project}/zones/{zone}"),
        "selfLink": url(path),
        "machineType": url(f"projects/{project}/zones/{zone}/machineTypes/{machine.group(2)}"),
        "labelFingerprint": _fingerprint(body.get("labels", {})),
        "metadata": {**metadata, "fingerprint": _fingerprint(metadata)},
        "tags": {**body.get("tags", {}), "fingerprint": _fingerprint(body.get("tags", {}))},
        "networkInterfaces": [_interface(given, index, project, zone, ip) for index, given in enumerate(body["networkInterfaces"])],
        "disks": [{"kind": "compute#attachedDisk", "index": index, **given} for index, given in enumerate(body["disks"])],
        "scheduling": {
            "onHostMaintenance": "MIGRATE",
            "automaticRestart": True,
            "preemptible": False,
            "provisioningModel": "STANDARD",
            **body.get("scheduling", {}),
        },
        "serviceAccounts": [
            {**given, "email": service_account(project) if given.get("email", "default") == "default" else given["email"]}
            for given in body.get("serviceAccounts", [])
        ],
    }


def url(path: str) -> str:
    return f"{_URL}{path}"


def timestamp(seconds: float) -> str:
    """RFC 3339 with milliseconds and a time zone, as Compute Engine writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _interface(given: dict[str, Any], index: int, project: str, zone: str, ip: str) -> dict[str, Any]:
    """An external address, where one is asked for, is the same loopback address: it is the only one that leads there."""
    access = [
        {"kind": "compute#accessConfig", "type": "ONE_TO_ONE_NAT", "name": "External NAT", **config, "natIP": ip}
        for config in given.get("accessConfigs", [])
    ]
    region = zone.rpartition("-")[0]
    return {
        "kind": "compute#networkInterface",
        "name": f"nic{index}",
        "network": url(f"projects/{project}/global/networks/default"),
        "subnetwork": url(f"projects/{project}/regions/{region}/subnetworks/default"),
        **given,
        "networkIP": ip,
        **({"accessConfigs": access} if access else {}),
    }


def _check_labels(labels: dict[str, str]) -> None:
    key_rule, value_rule = _LABEL
    for key, value in labels.items():
        if not key_rule.fullmatch(key):
            raise _invalid("resource.labels", key, "It violates constraint LABEL_KEY.")  # a guess
        if not value_rule.fullmatch(value):
            raise _invalid("resource.labels", value, "It violates constraint LABEL_VALUE.")  # a guess
    if len(labels) > _MAX_LABELS:
        raise _invalid("resource.labels", str(len(labels)), f"At most {_MAX_LABELS} labels are allowed.")  # a guess


def _check_metadata(items: dict[str, str]) -> None:
    """Compute Engine's limits (docs: "Metadata limitations"): 256 KB a value, 512 KB in all."""
    sizes = {key: len(value.encode()) for key, value in items.items()}
    for key, size in sizes.items():
        if size > _METADATA_VALUE_BYTES:
            raise _invalid("resource.metadata.items", key, f"The value has {size} bytes, at most {_METADATA_VALUE_BYTES} are allowed.")
    if sum(sizes.values()) > 2 * _METADATA_VALUE_BYTES:
        raise _invalid("resource.metadata.items", "", "The metadata is too large.")


def _invalid(field: str, value: str, why: str) -> Refusal:
    return Refusal(INVALID_ARGUMENT, f"Invalid value for field '{field}': '{value}'. {why}")


def _fingerprint(value: Any) -> str:
    return base64.b64encode(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:8]).decode()
