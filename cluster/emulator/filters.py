"""The part of Google's list filters (AIP-160, and Compute Engine's older spelling of it) that we and gcloud use.

Terms joined by AND, or each in parentheses of its own: `key=value`, `key!=value`, `key:*` (it has any), `key eq value`. Keys are `name`,
`status` and the like, or `labels.KEY`. Anything else is refused rather than misread.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from cluster.emulator.checks import INVALID_ARGUMENT
from cluster.emulator.model import Refusal

_TERM = re.compile(r"""(?P<key>[A-Za-z][\w.-]*)\s*(?P<how>!=|=|:| eq | ne )\s*(?P<value>"[^"]*"|'[^']*'|[^\s()"']+)""")
_JOINT = re.compile(r"[\s()]|AND\b")
Matches = Callable[[Mapping[str, Any]], bool]


def parse(text: str) -> Matches:
    """Whether a resource, as JSON, is meant. Raises Refusal."""
    terms: list[tuple[str, str, str]] = []
    place = 0
    while place < len(text):
        joint = _JOINT.match(text, place)
        if joint is not None:
            place = joint.end()
            continue
        term = _TERM.match(text, place)
        if term is None or (term["how"] == ":" and term["value"] != "*"):
            raise Refusal(INVALID_ARGUMENT, f"Invalid value for field 'filter': '{text}'. Invalid list filter expression.")
        terms.append((term["key"], term["how"].strip(), term["value"].strip("\"'")))
        place = term.end()
    return lambda resource: all(_holds(resource, *term) for term in terms)


def _holds(resource: Mapping[str, Any], key: str, how: str, value: str) -> bool:
    folder, _, label = key.partition(".")
    found = resource.get("labels", {}).get(label) if folder == "labels" else resource.get(key)
    if how == ":":
        return found is not None
    if how in ("eq", "ne"):  # a regular expression for the whole value, as Compute Engine has it
        return (found is not None and re.fullmatch(value, str(found)) is not None) == (how == "eq")
    return (found == value) == (how == "=")
