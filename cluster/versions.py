"""The versions that client, head and hosts of a cluster have to agree on: of Ray, of Python, and our own.

Ray lets nobody in whose Ray or whose minor version of Python is another; our own decides what records and settings mean.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import distributions, version
from typing import Any


@dataclass(frozen=True)
class Versions:
    """Of one machine."""

    podlaunch: str
    ray: str
    python: str
    """The minor version, such as 3.11."""


def own_versions() -> Versions:
    """Of this process. In a checkout that is not installed our own is unknown."""
    own = next((found.version for found in distributions(name="podlaunch")), "unknown")
    return Versions(own, version("ray"), f"{sys.version_info[0]}.{sys.version_info[1]}")


def disagreement(first: Versions, second: Versions | None) -> tuple[str, str] | None:
    """What each of two has and the other has not, such as ("Ray 2.60.0", "Ray 2.61.0"); None when they agree, or one is not known."""
    if second is None:
        return None
    names = [(name, label) for name, label in _LABELS.items() if getattr(first, name) != getattr(second, name)]
    return (_listed(first, names), _listed(second, names)) if names else None


def maker(record: Mapping[str, Any]) -> str:
    """Who wrote a record or settings that this version cannot read, as far as they say."""
    bundle = record.get("bundle")
    versions = bundle.get("versions") if isinstance(bundle, Mapping) else None
    found = versions.get("podlaunch") if isinstance(versions, Mapping) else None
    return "another version of podlaunch" if found is None else f"podlaunch {found} (this is {own_versions().podlaunch})"


_LABELS = {"ray": "Ray", "python": "Python", "podlaunch": "podlaunch"}


def _listed(versions: Versions, names: list[tuple[str, str]]) -> str:
    return " and ".join(f"{label} {getattr(versions, name)}" for name, label in names)
