"""The startup script of a slice's hosts with the user's own commands in it."""

from collections.abc import Sequence

_SHEBANG = "#!/bin/bash\n"


def with_commands(script: str, commands: Sequence[str]) -> str:
    """`script` with `commands` before everything else; empty when there is nothing to run. One that fails ends the script.

    They run in a shell of their own, so that an `exit` or `cd` in them does not reach what follows.
    """
    if not commands:
        return script
    body = script.removeprefix(_SHEBANG)
    lines = "\n".join(commands)
    own = f"( set -e\n{lines}\n)\nif [ $? -ne 0 ]; then\n  echo 'podlaunch: a startup command failed' >&2\n  exit 1\nfi\n"
    return f"{_SHEBANG}{own}{body}"
