"""The way into the hosts of a slice: programs of this machine, each of which is a shell on one host or runs a command there.

To a TPU VM leads gcloud, which knows the user's keys and login; to an emulated host, its environment.
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster import local
from cluster.config import ClusterConfig
from cluster.errors import ClusterError
from cluster.tpu.slices import ClusterSlice

_LOGIN_LIMIT_S = 60.0
"""gcloud may have to fetch a new token."""
# The end of the standard input means that whoever asked is gone or interrupted it: without a terminal ssh tells the host nothing else, and
# the command would go on there. bash itself is silent, else it tells of its jobs. 255 is ssh's own exit code for a lost connection, after
# which gcloud runs the command once more.
_SUPERVISED = (
    "exec 3<&0 4>&2 2>/dev/null; set -m; {command} </dev/null 2>&4 3<&- 4>&- & command=$!; "
    "{{ cat <&3; kill -TERM -- -$command; sleep 5; kill -KILL -- -$command; }} >/dev/null 4>&- & watch=$!; exec 3<&- 4>&-; "
    "wait $command; code=$?; kill -KILL -- -$watch; [ $code != 255 ] || code=254; exit $code"
)


@dataclass(frozen=True)
class HostProgram:
    """What is to be run on this machine in order to be on a host."""

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path | None = None
    """None: where we are."""


def supervised(words: Sequence[str]) -> str:
    """The shell command that runs `words` without input, and ends them when its own standard input ends.

    Its exit code is theirs, except 254 for 255.
    """
    return f"bash -c {shlex.quote(_SUPERVISED.format(command=shlex.join(words)))}"


def programs(
    config: ClusterConfig, item: ClusterSlice, workers: Iterable[int], command: str | None, *, env: Mapping[str, str] = os.environ
) -> dict[int, HostProgram]:
    """For each of these hosts of the slice: `command` there, or, without one, an interactive shell.

    Raises ClusterError when there is no way in: no gcloud, nobody logged in, no such emulated host.
    """
    if config.cloud == "emulated":
        node = f"projects/{config.effective_project}/locations/{item.zone}/nodes/{item.name}"
        return {worker: _emulated(node, worker, command, env) for worker in workers}
    _check_gcloud(env)
    return {worker: HostProgram(gcloud_command(config, item, worker, command), env) for worker in workers}


def gcloud_command(config: ClusterConfig, item: ClusterSlice, worker: int, command: str | None) -> list[str]:
    """By the host's address on the internet where it has one; else through Identity-Aware Proxy, or directly inside the VPC."""
    route, track = [], []
    if not config.external_ips and config.effective_head_access == "direct":
        route = ["--internal-ip"]
    elif not config.external_ips:
        route, track = ["--tunnel-through-iap"], ["alpha"]  # the released command has no such option (Google Cloud CLI 528)
    words = ["gcloud", *track, "compute", "tpus", "tpu-vm", "ssh", item.name]
    words += [f"--project={config.effective_project}", f"--zone={item.zone}", f"--worker={worker}", *route]
    return words if command is None else [*words, "--quiet", f"--command={command}"]


def _emulated(node: str, worker: int, command: str | None, env: Mapping[str, str]) -> HostProgram:
    host, cwd = local.host_environment(node, worker)
    argv = [env.get("SHELL") or "bash"] if command is None else ["bash", "-c", command]
    terminal = {name: env[name] for name in ("TERM",) if name in env}  # as ssh does
    return HostProgram(argv, {**host, **terminal}, cwd)


def _check_gcloud(env: Mapping[str, str]) -> None:
    """One line now instead of many from every host. Raises ClusterError."""
    gcloud = shutil.which("gcloud", path=env.get("PATH"))
    if gcloud is None:
        words = "install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install), or run this where it is"
        raise ClusterError(f"there is no gcloud on this machine, which leads to TPU VMs; {words}")
    command = [gcloud, "auth", "print-access-token", "--quiet"]  # the only question that covers every kind of login; the answer is dropped
    try:
        done = subprocess.run(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=_LOGIN_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ClusterError(f"gcloud does not say within {_LOGIN_LIMIT_S:.0f} s whether it is logged in; run: gcloud auth login") from None
    if done.returncode != 0:
        said = next((line.strip() for line in done.stderr.splitlines() if "ERROR" in line), done.stderr.strip() or "it says nothing")
        raise ClusterError(f"gcloud is not logged in ({said}); run: gcloud auth login")
