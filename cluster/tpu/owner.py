"""Who made a resource: an id of this user's state directory, which alone knows which clusters live."""

import re
import secrets

from cluster.state import state_dir, write_atomic


def owner_id() -> str:
    """Twelve hex digits, the same for every command that uses this state directory; made at the first call."""
    path = state_dir() / "owner"
    if not path.exists():
        # Two first commands at once: both write, and both read what was written last.
        write_atomic(path, secrets.token_hex(6))
    found = path.read_text(encoding="utf-8").strip()
    assert re.fullmatch(r"[0-9a-f]{12}", found), path
    return found
