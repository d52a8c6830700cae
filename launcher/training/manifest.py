"""The manifest of a checkpoint: checksums of its files, written last. A checkpoint without a manifest that agrees does not count.

Orbax verifies nothing after its commit: flipped bytes restore wrong values silently.
"""

import json
from collections.abc import Mapping
from typing import Any

from launcher.training.storage import COMMITTED, MANIFEST, Facts, Storage

ABOUT = "about.json"
"""The step, and what the loss curve depends on (launcher/curve.py)."""
_MARKS = (MANIFEST, COMMITTED)


def seal(storage: Storage, name: str, step: int, meaning: Mapping[str, Any]) -> None:
    """Write about.json and then the manifest into the folder `name`, whose files are all there."""
    storage.write(name, ABOUT, _json({"version": 1, "step": step, "meaning": meaning}))
    files = {file: {"bytes": facts.bytes, "crc32c": facts.crc32c} for file, facts in storage.facts(name).items() if file not in _MARKS}
    storage.write(name, MANIFEST, _json({"version": 1, "step": step, "files": files}))


def verify(storage: Storage, name: str, index: int = 0, count: int = 1) -> str | None:
    """None when the files are what the manifest says, else the reason in one line. Extra files are no harm.

    With `count` processes each looks after its share; the checkpoint is good when all of them say None.
    """
    try:
        content = json.loads(storage.read(name, MANIFEST))
        expected = {str(file): Facts(int(entry["bytes"]), str(entry["crc32c"])) for file, entry in content["files"].items()}
        step = int(content["step"])
    except FileNotFoundError:
        return "it has no manifest"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is damaged"
    if ABOUT not in expected:
        return "its manifest is damaged"
    if str(step) != name:
        return f"it is the checkpoint of step {step}"
    mine = {file: expected[file] for file in share_of(expected, index, count)}
    return compare(mine, storage.facts(name, mine))


def read_about(storage: Storage, name: str) -> dict[str, Any]:
    """What `seal` was given as `meaning`. The checkpoint has been verified."""
    meaning: dict[str, Any] = json.loads(storage.read(name, ABOUT))["meaning"]
    return meaning


def compare(expected: Mapping[str, Facts], found: Mapping[str, Facts]) -> str | None:
    """The first file that is not what it should be, in one line."""
    for file, facts in sorted(expected.items()):
        if file not in found:
            return f"{file} is missing"
        if found[file].bytes != facts.bytes:
            return f"{file} has {found[file].bytes} bytes instead of {facts.bytes}"
        if found[file].crc32c != facts.crc32c:
            return f"the checksum of {file} does not agree"
    return None


def share_of(files: Mapping[str, Facts], index: int, count: int) -> list[str]:
    """The files that process `index` of `count` looks after: about as many bytes for each, the same answer everywhere."""
    loads = [0] * count
    mine = []
    for file, facts in sorted(files.items(), key=lambda item: (-item[1].bytes, item[0])):
        lightest = loads.index(min(loads))
        loads[lightest] += facts.bytes + 1  # empty files are work too
        if lightest == index:
            mine.append(file)
    return mine


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
