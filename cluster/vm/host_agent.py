"""The agent of one TPU host: learns who it is, joins the host to its Ray cluster, and keeps it there.

Runs as the end of the VM's startup script: `python -m cluster.vm.host_agent`. Nobody reaches a host by SSH to set it up.
"""

import functools
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cluster.errors import ClusterError
from cluster.logs import set_up_logging
from cluster.processes import MARKER, ProcessRecord, spawn
from cluster.ray_env import ray_environment
from cluster.state import logs_dir, private_dir
from cluster.storage import storage_environment
from cluster.tpu.api import TpuApi
from cluster.versions import Versions, disagreement, own_versions
from cluster.vm import metadata
from cluster.vm.cleanup import clean_host
from cluster.vm.head_watch import HeadWatch, reach
from cluster.vm.host_dir import HOST_DIR_VARIABLE, Notice, host_dir, read_companion, write_notice
from cluster.vm.host_ray import HostRay
from cluster.vm.metadata import HostIdentity
from cluster.vm.notices import NoticeWatch
from cluster.vm.own_slice import OwnSlice
from cluster.vm.settings import SETTINGS_VARIABLE, HostSettings

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 128 * 2**20
"""Runs move their data through files, not through Ray's object store; Ray's default would claim 30 % of the memory."""
TICK_S = 1.0
HEAD_INTERVAL_S = 2.0
"""How often the head is tried: often enough to see one that is started again at once, which takes it some seconds."""
OTHERS_DELAY_S = 120.0
"""Worker 0 deletes the slice when the head is lost; the others do it when the slice is still there so much later."""
LET_DELETE_S = 60.0
"""Worker 0's Ray is the slice for the autoscaler: when it ends, the autoscaler deletes the slice within seconds, and a worker 0 that came
back meanwhile would be taken for a host of a living slice. One that is still there after this is not known to any autoscaler (the head is a
new one), and joins again. Where the head is known to be a new one, no host waits."""
END_GRACE_S = 25.0
"""For Ray to drain when the agent is told to end: less than the 30 s that a spot VM has."""
COMPANION_GRACE_S = 2.0
DRAIN_MARGIN_S = 2.0
FLUSH_BEFORE_S = 1.0


def host_environment(
    identity: HostIdentity, settings: HostSettings, folder: Path, token_file: Path, base: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment of a host's Ray processes; from the four TPU_ variables Ray derives its TPU resources and labels."""
    env = ray_environment(token_file, base) | storage_environment(settings.storage_endpoint)
    env |= {
        HOST_DIR_VARIABLE: str(folder),
        # After a notice Ray gets SIGTERM: it drains the node, and has this long before it ends what still runs on it.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(settings.notice_s - DRAIN_MARGIN_S),
        "TPU_NAME": identity.slice_name,
        "TPU_WORKER_ID": str(identity.worker_id),
        "TPU_ACCELERATOR_TYPE": identity.accelerator_type,
        "TPU_TOPOLOGY": identity.topology,
    }
    if identity.worker_id == 0:
        # One autoscaler instance is one slice: Ray links it to exactly one node, and that is worker 0.
        env |= {"RAY_CLOUD_INSTANCE_ID": identity.slice_name, "RAY_NODE_TYPE_NAME": settings.node_type}
    return env


def ray_start_command(identity: HostIdentity, settings: HostSettings, temp_dir: Path) -> list[str]:
    """The `ray start` of this host."""
    resources = f'{{"TPU": {settings.chips_per_host}'
    if identity.worker_id == 0:
        resources += f', "{settings.slice_resource}": 1'
    return [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--block",
        f"--address={settings.head_address}",
        f"--node-ip-address={identity.ip}",
        f"--temp-dir={temp_dir}",
        f"--resources={resources}}}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-agent-listen-port=0",
        "--include-log-monitor=false",  # it reads all logs ten times a second, to print them at a driver: ours asks for none
        "--disable-usage-stats",
    ]


class HostAgent:
    """Everything that a host does for itself, one round of `steps` after the other; nothing in it waits for long."""

    def __init__(
        self,
        identity: HostIdentity,
        folder: Path,
        ray: HostRay,
        companion: HostRay,
        notices: NoticeWatch,
        head: HeadWatch,
        own_slice: OwnSlice,
        head_lost_grace: float,
        clock: Callable[[], float],
        *,
        may_join: bool = True,
    ) -> None:
        """`folder`: the host's, see host_dir. `companion`: what runs have asked for there. `head_lost_grace`: seconds. `clock`: seconds
        since the epoch, as in notices. `may_join`: whether Ray may be started here at all.
        """
        self._may_join = may_join
        self._identity, self._folder, self._clock = identity, folder, clock
        self._ray, self._companion, self._notices, self._head, self._own_slice = ray, companion, notices, head, own_slice
        # Worker 0 speaks for the slice; the others only when it does not.
        self._grace = head_lost_grace + (0.0 if identity.worker_id == 0 else OTHERS_DELAY_S)
        self._notice: Notice | None = None
        self._flush_at = float("inf")

    @property
    def steps(self) -> Sequence[Callable[[], None]]:
        """One round; each step stands by itself, so that an error in one does not keep the others from being done."""
        return (self._watch_notices, self._head.tick, self._keep_ray, self._keep_companion, self._flush, self._give_up)

    def end(self) -> None:
        """Within `END_GRACE_S` and a moment."""
        self._ray.end(END_GRACE_S)
        self._companion.end(COMPANION_GRACE_S)  # after Ray: what trains may be a process of its

    def _watch_notices(self) -> None:
        """A new notice goes to the runner of this host by a file, and to Ray, which then places nothing here any more."""
        notice = self._notices.poll()
        if notice is self._notice:
            return
        write_notice(self._folder, notice)
        self._notice = notice
        if notice is None:
            logger.info("the notice was taken back")
            self._flush_at = float("inf")
            return
        logger.warning("%s: this host ends in about %.0f s", notice.kind, notice.deadline - self._clock())
        self._flush_at = notice.deadline - FLUSH_BEFORE_S
        self._ray.ask_to_end()

    def _keep_ray(self) -> None:
        """A Ray whose head ended is of no use to the next head, and would notice only after a minute (no Redis keeps what Ray knows)."""
        ended = self._head.ended_since(self._ray.since)
        self._ray.tick(may_start=self._may_join and self._head.reachable and self._notice is None, replace=ended)

    def _keep_companion(self) -> None:
        self._companion.tick(may_start=self._ray.up and bool(read_companion(self._folder)))

    def _flush(self) -> None:
        if self._clock() >= self._flush_at:
            self._flush_at = float("inf")
            os.sync()  # logs and what else is still in memory: a second later this machine is gone

    def _give_up(self) -> None:
        """When nobody else will: the slice deletes itself."""
        if self._head.lost_for > self._grace:
            self._own_slice.delete(f"the head has not been reached for {self._head.lost_for:.0f} s")
        elif self._ray.failing:
            self._own_slice.delete(f"Ray cannot be kept up on worker {self._identity.worker_id}")


class Rounds:
    """Does the steps of one round; an error is logged once for as long as it stays the same, and the next round comes: a host must not be
    lost to its agent's bug.
    """

    def __init__(self, steps: Sequence[Callable[[], None]]) -> None:
        self._steps = steps
        self._told = [""] * len(steps)

    def next(self) -> None:
        for index, step in enumerate(self._steps):
            try:
                step()
                self._told[index] = ""
            except Exception as error:  # the outermost loop
                if repr(error) != self._told[index]:
                    logger.exception("a step of this round failed; going on")
                self._told[index] = repr(error)


def make_agent(identity: HostIdentity, settings: HostSettings, fetch: metadata.Fetch) -> HostAgent:
    """With this machine's devices, folders and clocks."""
    folder = host_dir()
    project, zone = metadata.read_place(fetch)
    temp_dir = Path(tempfile.gettempdir())
    command = ray_start_command(identity, settings, temp_dir / "ray")  # as short as can be: a socket's path is limited to 107 bytes
    name = f"host-{identity.slice_name}-{identity.worker_id}"

    def start() -> ProcessRecord:
        clean_host(Path(os.environ.get("PODLAUNCH_DEVICES", "/dev")), temp_dir, spare=(os.getpid(), os.getppid()))
        # Not before this: the right to read the token may come later than the host, which looks after itself meanwhile.
        env = host_environment(identity, settings, folder, settings.token.local_file(folder))
        logger.info("starting %s", " ".join(command))
        marker = os.environ.get(MARKER, name)
        return spawn(command, marker=marker, env=env, log=logs_dir() / f"{name}.out", cwd=folder)

    def start_companion() -> ProcessRecord:
        env = {**os.environ, HOST_DIR_VARIABLE: str(folder)}
        command = [sys.executable, *read_companion(folder)]
        return spawn(command, marker=os.environ.get(MARKER, name), env=env, log=logs_dir() / f"{name}.out", cwd=folder)

    ray = HostRay(start, folder, time.monotonic, rejoin_after=LET_DELETE_S if identity.worker_id == 0 else 0.0)
    if not ray.up:
        write_notice(folder, None)  # of a life before the last boot
    interval = min(HEAD_INTERVAL_S, settings.head_lost_grace_s / 10)

    def connect() -> TpuApi:
        return TpuApi(settings.endpoint, project, patience=20.0)

    return HostAgent(
        identity,
        folder,
        ray,
        HostRay(start_companion, private_dir(folder / "companion"), time.monotonic, what="the companion"),
        NoticeWatch(fetch, time.time, settings.notice_s),
        HeadWatch(lambda: reach(settings.head_address), time.monotonic, interval),
        OwnSlice(identity.slice_name, zone, connect, time.monotonic, owned=settings.owned),
        settings.head_lost_grace_s,
        time.time,
        may_join=refusal(settings, own_versions()) is None,
    )


def refusal(settings: HostSettings, own: Versions) -> str | None:
    """Why this host must not join its cluster, or None. Ray's own words for that would come after minutes, and only in its logs."""
    found = disagreement(own, settings.versions)
    if found is None:
        return None
    here, there = found
    return (
        f"Ray is not started: this host has {here}, cluster {settings.cluster!r} runs {there}; its image must hold what the cluster does, "
        "or nothing of ours (then the host installs it from cluster.bucket)"
    )


def read_settings(env: Mapping[str, str], fetch: Callable[[str], str]) -> HostSettings:
    """From the environment where whoever started the agent put them there, else from the node's metadata."""
    given = env.get(SETTINGS_VARIABLE)
    return HostSettings.from_dict(json.loads(given) if given is not None else metadata.read_settings(fetch))


def main() -> None:
    fetch = functools.partial(metadata.fetch, timeout=2.0)
    identity = metadata.read_identity(fetch)
    settings = read_settings(os.environ, fetch)
    set_up_logging(f"host-{identity.slice_name}-{identity.worker_id}", terminal=None)
    logger.info("host %d of slice %s, cluster %s", identity.worker_id, identity.slice_name, settings.cluster)
    why = refusal(settings, own_versions())
    if why is not None:
        logger.error("%s", why)
        print(f"podlaunch: {why}", file=sys.stderr, flush=True)  # into the log of the boot, where the installer's refusals are
    try:
        metadata.tell_trouble(identity, why)
    except ClusterError as error:  # as on a TPU VM made elsewhere, whose metadata does not allow it
        logger.info("nothing can be published about this host: %s", error)
    ending = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ending.set())
    agent = make_agent(identity, settings, fetch)
    rounds = Rounds(agent.steps)
    while not ending.wait(TICK_S):
        rounds.next()
    agent.end()


if __name__ == "__main__":
    main()
