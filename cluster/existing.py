"""TPU VMs that the user made elsewhere: a cluster uses them by name and never deletes them.

Their metadata does not hold our startup script. To write it there and restart them is no way in: Spot TPU VMs cannot be started again once
they are stopped, and a restart ends whatever else they do. So the startup script is sent to all hosts of a slice by one command of gcloud,
`tpu-vm ssh --worker=all`, which knows the user's keys and login, and the agent that it starts is ended in the same way. It is the only
case in which a host is reached by SSH. A host that was restarted has lost its agent; the next `tpu start` sends it again.
"""

import base64
import dataclasses
import logging
import shlex
import shutil
import subprocess
from collections.abc import Callable, Collection, Sequence
from string import Template

from cluster.errors import ClusterError, ConfigError
from cluster.tpu.lifecycle import Life
from cluster.tpu.provider import TPUProvider
from cluster.tpu.slices import OWNER_LABEL, ClusterSlice
from cluster.vm.settings import SETTINGS_VARIABLE, HostSettings

log = logging.getLogger(__name__)
Run = Callable[[Sequence[str]], None]
"""Runs a program. Raises ClusterError with its last words when it fails."""
SSH_LIMIT_S = 300.0
"""The first connection of a user makes a key and spreads it, which takes a minute."""

# The agent is known by its process id as long as the machine has not been booted again, after which the id may be somebody else's.
_COMMON = """folder="$$HOME/.podlaunch/$cluster"
root=""
[ "$$(id -u)" = 0 ] || root="sudo -n --preserve-env=$variable"
boot="$$(cat /proc/sys/kernel/random/boot_id)"
alive() { [ "$$(cat "$$folder/boot" 2>/dev/null)" = "$$boot" ] && $$root kill -0 "$$(cat "$$folder/pid")" 2>/dev/null; }
"""
_ATTACH = Template(
    _COMMON
    + """alive && exit 0
mkdir -p "$$folder" && chmod 700 "$$folder" || exit 1
echo $script | base64 -d > "$$folder/startup-script" || exit 1
$variable="$$(echo $settings | base64 -d)"
export $variable
$$root setsid bash "$$folder/startup-script" > "$$folder/output" 2>&1 < /dev/null &
echo $$! > "$$folder/pid" && echo "$$boot" > "$$folder/boot"
"""
)
_DETACH = Template(
    _COMMON
    + """if alive; then
  $$root kill -TERM "$$(cat "$$folder/pid")"
  for _ in $$(seq 150); do alive || break; sleep 0.2; done
  if alive; then $$root kill -KILL "$$(cat "$$folder/pid")"; fi
fi
rm -rf "$$folder"
"""
)


def run_gcloud(command: Sequence[str]) -> None:
    """Run `command` with the gcloud of this machine. Raises ClusterError; what it says in full is in the log."""
    if shutil.which(command[0]) is None:
        raise ClusterError(f"there is no {command[0]} on this machine; install the Google Cloud CLI, or run this where it is")
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SSH_LIMIT_S, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise ClusterError(f"no answer within {SSH_LIMIT_S:.0f} s") from None
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    log.info("%s ended with %d: %s", command[0], done.returncode, " | ".join(said))
    if done.returncode != 0:
        raise ClusterError(said[-1].strip() if said else f"it ended with exit code {done.returncode}")


def check(provider: TPUProvider) -> list[ClusterSlice]:
    """The slices that the configuration names. Raises ConfigError when one is not there, not of the cluster's type, or another cluster's;
    ClusterError when it is not READY; TPUError.
    """
    found = {item.name: item for item in provider.existing_slices()}
    for name in provider.config.adopted:
        _check_one(provider, name, found.get(name))
    return list(found.values())


def attach(provider: TPUProvider, settings: HostSettings, script: str, joined: Collection[str], run: Run = run_gcloud) -> None:
    """Start the host agent on every host of those slices that have not `joined` with all of their hosts.

    Raises ClusterError, with the command to be run by hand, and what `check` raises.
    """
    own = dataclasses.replace(settings, node_type=existing_type(settings.node_type), owned=False)
    for item in check(provider):
        if list(joined).count(item.name) < provider.config.hosts_per_slice:
            values = {"script": _base64(script), "settings": _base64(own.to_json())}
            _ssh(provider, item, _ATTACH.substitute(cluster=settings.cluster, variable=SETTINGS_VARIABLE, **values), run)


def detach(provider: TPUProvider, progress: Callable[[str], None], run: Run = run_gcloud) -> None:
    """End the host agents, and leave the VMs as they are. One that cannot be reached is told to `progress`: its agent ends with the VM."""
    command = _DETACH.substitute(cluster=provider.config.name, variable=SETTINGS_VARIABLE)
    for item in provider.existing_slices():
        if item.life is Life.READY:
            try:
                _ssh(provider, item, command, run)
            except ClusterError as error:
                progress(str(error))


def existing_type(node_type: str) -> str:
    """Ray's name for such slices of a kind. A type of their own, for which Ray never asks and which it never ends for being idle."""
    return f"{node_type}-existing"


def _check_one(provider: TPUProvider, name: str, item: ClusterSlice | None) -> None:
    config = provider.config
    if item is None or item.node is None:
        raise ConfigError(f"cluster.existing: there is no TPU VM {name!r} in {', '.join(provider.zones)} of project {provider.api.project}")
    kind, wanted = config.accelerator, item.node
    if (wanted.accelerator_type, wanted.topology or kind.topology) != (kind.name, kind.topology):
        has = f"{wanted.accelerator_type} ({wanted.topology})" if wanted.topology else wanted.accelerator_type
        raise ConfigError(f"cluster.existing: {name!r} is a {has}, the cluster is of {kind.name} ({kind.topology})")
    if OWNER_LABEL in item.labels:
        raise ConfigError(
            f"cluster.existing: {name!r} was made by podlaunch for {item.labels[OWNER_LABEL]!r} and would be deleted with that"
        )
    if item.life is not Life.READY:
        raise ClusterError(f"existing slice {name!r} in {item.zone} is {item.state}; make it READY, or take it out of cluster.existing")


def _ssh(provider: TPUProvider, item: ClusterSlice, command: str, run: Run) -> None:
    words = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", item.name, f"--project={provider.api.project}", f"--zone={item.zone}"]
    words += ["--worker=all", "--quiet"]
    # As one word without quotes or line breaks in it: it passes through several shells.
    words.append(f"--command=echo {_base64(command)} | base64 -d | bash")
    try:
        run(words)
    except ClusterError as error:
        by_hand = shlex.join(words)
        raise ClusterError(f"existing slice {item.name!r} in {item.zone} cannot be reached: {error}; by hand: {by_hand}") from error


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
