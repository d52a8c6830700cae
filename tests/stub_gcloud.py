"""A `gcloud` for tests: `compute ssh ... -- -N -L ADDRESS:LOCAL:HOST:REMOTE` forwards that port, it fails with given words, or it
takes what the real one takes of the commands that our documents show, and does nothing.
"""

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

_CHECK = """#!{python}
import sys
forms = {forms!r}
given = sys.argv[1:]
words = [word for word in given if not word.startswith("-")]
form = next((form for form in forms if words[:len(form.split())] == form.split()), None)
if form is None:
    sys.exit(f"ERROR: (gcloud) Invalid choice: {{' '.join(words)!r}}")
least, most, flags = forms[form]
if not least <= len(words) - len(form.split()) <= most:
    sys.exit(f"ERROR: (gcloud.{{form.replace(' ', '.')}}) {{least}} to {{most}} names are taken, given: {{given}}")
for flag in given:
    name, value = flag.partition("=")[::2]
    if flag.startswith("-") and flags.get(name) != bool(value):
        sys.exit(f"ERROR: (gcloud.{{form.replace(' ', '.')}}) unrecognized arguments: {{flag}}")
"""
_SSH = {"--project": True, "--zone": True, "--worker": True, "--command": True, "--internal-ip": False, "--quiet": False}
_RULE = ("--network", "--direction", "--action", "--rules", "--allow", "--priority", "--source-ranges", "--source-tags", "--target-tags")
FORMS: dict[str, tuple[int, int, dict[str, bool]]] = {
    "auth login": (0, 1, {}),
    "auth application-default login": (0, 0, {}),
    "auth print-access-token": (0, 1, {"--quiet": False}),
    "config set": (2, 2, {}),
    "services enable": (1, 20, {}),
    "iam service-accounts create": (1, 1, {}),
    "storage buckets create": (
        1,
        20,
        {"--location": True, "--uniform-bucket-level-access": False, "--public-access-prevention": False},
    ),
    "storage rm": (1, 20, {"--recursive": False}),
    "secrets list": (0, 0, {}),
    "compute networks create": (1, 1, {"--subnet-mode": True}),
    "compute networks subnets update": (1, 1, {"--region": True, "--enable-private-ip-google-access": False}),
    "compute routers create": (1, 1, {"--network": True, "--region": True}),
    "compute routers delete": (1, 20, {"--region": True}),
    "compute routers nats create": (
        1,
        1,
        {"--router": True, "--region": True, "--nat-all-subnet-ip-ranges": False, "--auto-allocate-nat-external-ips": False},
    ),
    "compute firewall-rules create": (1, 1, dict.fromkeys(_RULE, True)),
    "compute instances list": (0, 20, {}),
    "compute tpus tpu-vm list": (0, 0, {"--zone": True}),
    "compute tpus queued-resources list": (0, 0, {"--zone": True}),
    "compute tpus tpu-vm ssh": (1, 1, _SSH),
    "alpha compute tpus tpu-vm ssh": (1, 1, {**_SSH, "--tunnel-through-iap": False}),
}
"""Of a command of Google Cloud CLI 528: the least and the most names, and its options, with whether each takes a value."""


def checking_gcloud(folder: Path) -> dict[str, str]:
    """An environment whose `gcloud` refuses what is not in `FORMS`, and else does nothing, successfully."""
    return _install(folder, _CHECK.format(python=sys.executable, forms=FORMS))


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
