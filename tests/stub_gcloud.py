"""A `gcloud` for tests: `compute ssh ... -- -N -L ADDRESS:LOCAL:HOST:REMOTE` forwards that port, or fails with given words."""

import os
import sys
from pathlib import Path

_FORWARD = """#!{python}
import asyncio, sys, time
with open({calls!r}, "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if {hang}:
    time.sleep(600)
address, local, host, remote = sys.argv[sys.argv.index("-L") + 1].split(":")

async def copy(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    writer.close()

async def connected(reader, writer):
    try:
        there = await asyncio.open_connection({host!r} or host, int(remote))
    except OSError:
        writer.close()
        return
    await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))

async def main():
    server = await asyncio.start_server(connected, address, int(local))
    await server.serve_forever()

asyncio.run(main())
"""


def forwarding_gcloud(folder: Path, *, hang: bool = False, host: str = "") -> dict[str, str]:
    """An environment whose `gcloud` forwards; `host`: to there instead of the host that is asked for. Each call is a line of `calls`."""
    return _install(folder, _FORWARD.format(python=sys.executable, calls=str(folder / "calls"), hang=hang, host=host))


def failing_gcloud(folder: Path, words: str) -> dict[str, str]:
    return _install(folder, f"#!{sys.executable}\nimport sys\nsys.exit({words!r})\n")


def _install(folder: Path, program: str) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    (folder / "gcloud").write_text(program)
    (folder / "gcloud").chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
