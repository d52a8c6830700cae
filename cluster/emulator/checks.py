"""What the emulated service refuses, in the real one's words where they are known.

The words come from the API fact sheet (public issues and run logs). A guess is marked as one.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.emulator.model import Refusal
from cluster.errors import ConfigError
from cluster.tpu import catalog
from cluster.tpu.catalog import AcceleratorType

INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, FAILED_PRECONDITION, UNAVAILABLE = 3, 5, 6, 9, 14
_PARENT = re.compile(r"projects/[^/]+/locations/[^/]+")
_ZONE = re.compile(r"[a-z]+-[a-z]+[0-9]+-[a-z]")
_ID = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_METADATA_VALUE_BYTES = 256 * 1024
_UPDATABLE = frozenset({"description", "tags", "labels", "metadata", "data_disks"})
# AcceleratorConfig.Type by number.
_GENERATION_OF_CONFIG = {2: "v2", 4: "v3", 7: "v4", 9: "v5e", 10: "v5p", 11: "v6e"}


def check_parent(parent: str, *, wildcard: bool = False) -> str:
    """The zone of `projects/P/locations/ZONE`; with `wildcard` also `-`, for all. Raises Refusal."""
    zone = parent.rpartition("/")[2]
    if not _PARENT.fullmatch(parent):
        raise Refusal(INVALID_ARGUMENT, f'Cloud TPU received an invalid argument. The "parent" value "{parent}" was not found.')
    if not (_ZONE.fullmatch(zone) or (wildcard and zone == "-")):
        raise Refusal(7, f"Permission denied on 'locations/{zone}' (or it may not exist).")
    return zone


def check_resource_id(field: str, value: str) -> None:
    """Raises Refusal. The rule is the one that marin-community/marin checks; the words are a guess."""
    if not _ID.fullmatch(value):
        raise Refusal(
            INVALID_ARGUMENT,
            f'Cloud TPU received an invalid argument. The "{field}" value "{value}" is not valid: it must match '
            f"[a-z]([-a-z0-9]{{0,61}}[a-z0-9])?. [EID: 0xe41e]",
        )


def check_kind(node: Any, zone: str) -> AcceleratorType:
    """The accelerator type that a raw Node asks for, by name or by accelerator_config. Raises Refusal."""
    if node.accelerator_type and node.HasField("accelerator_config"):
        words = "Cloud TPU received a bad request. accelerator_type and accelerator_config are mutually exclusive. [EID: 0xe41c]"  # a guess
        raise Refusal(INVALID_ARGUMENT, words)
    try:
        if node.HasField("accelerator_config"):
            generation = _GENERATION_OF_CONFIG.get(node.accelerator_config.type_, "unspecified")
            return catalog.resolve(generation=generation, topology=node.accelerator_config.topology)
        kind = catalog.by_name().get(node.accelerator_type)
    except ConfigError:
        kind = None
    if kind is None:
        name = node.accelerator_type or node.accelerator_config.topology
        raise Refusal(
            INVALID_ARGUMENT,
            f'Cloud TPU received a bad request. The requested accelerator configuration for accelerator type, "{name}", could not be found '
            f'in the zonal accelerator configurations for "{zone}".; the accelerator {name} was not found in zone {zone} [EID: 0xe41d]',
        )
    return kind


def check_runtime_version(version: str) -> None:
    """Raises Refusal. The words are a guess, in the shape that another unknown value gives."""
    if version not in runtime_versions():
        words = f'Cloud TPU received an invalid argument. The "runtimeVersion" value "{version}" was not found. [EID: 0xe41b]'
        raise Refusal(INVALID_ARGUMENT, words)


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raises Refusal. Compute Engine's limits (docs: "Metadata limitations"): 256 KB a value, 512 KB in all. The words are a guess."""
    sizes = {key: len(value.encode()) for key, value in metadata.items()}
    for key, size in sizes.items():
        if size > _METADATA_VALUE_BYTES:
            words = f'Cloud TPU received an invalid argument. The metadata value of "{key}" is too large: {size} bytes. [EID: 0xe41a]'
            raise Refusal(INVALID_ARGUMENT, words)
    if sum(sizes.values()) > 2 * _METADATA_VALUE_BYTES:
        raise Refusal(INVALID_ARGUMENT, "Cloud TPU received an invalid argument. The metadata is too large. [EID: 0xe41a]")


def check_update(fields: Sequence[str]) -> None:
    """Raises Refusal. The fields are those that the client's documentation names; the words are a guess."""
    wrong = [name for name in fields if name not in _UPDATABLE]
    if wrong or not fields:
        value = ",".join(fields)
        raise Refusal(INVALID_ARGUMENT, f'Cloud TPU received an invalid argument. The "updateMask" value "{value}" is not valid.')


def runtime_versions() -> list[str]:
    return sorted({kind.runtime_version for kind in catalog.all_types()})


def not_found(path: str) -> Refusal:
    """The words are a guess."""
    return Refusal(NOT_FOUND, f"Resource '{path}' was not found")


def not_found_by_compute(path: str) -> Refusal:
    """In the words of Compute Engine."""
    return Refusal(NOT_FOUND, f"The resource '{path}' was not found")


def already_exists(path: str) -> Refusal:
    return Refusal(ALREADY_EXISTS, f"Resource '{path}' already exists")
