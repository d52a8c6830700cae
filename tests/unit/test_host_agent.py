"""What a host makes of its metadata, and how its Ray is kept alive."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from cluster.errors import ClusterError
from cluster.processes import ProcessRecord, kill_members, reap, spawn
from cluster.secret_place import SecretPlace
from cluster.vm.bootstrap import startup_script
from cluster.vm.head_watch import FAILURES, Answer, HeadWatch
from cluster.vm.host_agent import FLUSH_BEFORE_S, OTHERS_DELAY_S, HostAgent, Rounds, host_environment, ray_start_command
from cluster.vm.host_dir import NoticeKind, read_companion, read_notice, write_companion
from cluster.vm.host_ray import HostRay
from cluster.vm.metadata import HostIdentity, read_identity
from cluster.vm.notices import NoticeWatch
from cluster.vm.own_slice import OwnSlice
from cluster.vm.restart import restart_delays
from cluster.vm.settings import HostSettings

SETTINGS = HostSettings("c", "10.0.0.9:6379", SecretPlace(file="/state/token"), "v4-16", "podlaunch-slice-v4-16", 4)
METADATA = {
    "instance/attributes/agent-worker-number": "1\n",
    "instance/attributes/worker-network-endpoints": "unknown:1:10.0.0.1,unknown:2:10.0.0.2",
    "instance/attributes/instance-id": "mine-0",
    "instance/attributes/accelerator-type": "v4-16",
    "instance/attributes/tpu-env": "ACCELERATOR_TYPE: 'v4-16'\nTOPOLOGY: '2x2x2'\nWORKER_ID: '1'\n",
}


def fetcher(values: Mapping[str, str]) -> object:
    return values.__getitem__


@pytest.mark.parametrize("endpoints", ["unknown:1:10.0.0.1,unknown:2:10.0.0.2", "10.0.0.1,10.0.0.2"])
def test_identity_is_read_from_the_old_and_the_new_form_of_endpoints(endpoints: str) -> None:
    identity = read_identity(({**METADATA, "instance/attributes/worker-network-endpoints": endpoints}).__getitem__)
    assert identity == HostIdentity("mine-0", 1, ("10.0.0.1", "10.0.0.2"), "v4-16", "2x2x2")
    assert identity.ip == "10.0.0.2"


@pytest.mark.parametrize("worker", ["", "none", "2", "-1"])
def test_a_missing_or_impossible_worker_id_never_becomes_zero(worker: str) -> None:
    with pytest.raises(ClusterError, match="calls this host worker"):
        read_identity(({**METADATA, "instance/attributes/agent-worker-number": worker}).__getitem__)


@pytest.mark.parametrize("worker", [0, 1])
def test_only_worker_0_carries_the_autoscalers_instance_and_the_slices_resource(worker: int) -> None:
    identity = HostIdentity("mine-0", worker, ("10.0.0.1", "10.0.0.2"), "v4-16", "2x2x2")
    leaked = {"RAY_CLOUD_INSTANCE_ID": "the-head", "RAY_NODE_TYPE_NAME": "head", "MEGASCALE_SLICE_ID": "7", "PATH": "/bin"}
    env = host_environment(identity, SETTINGS, Path("/host"), Path("/state/token"), leaked)
    assert env["PODLAUNCH_HOST_DIR"] == "/host"
    assert env.get("RAY_CLOUD_INSTANCE_ID") == ("mine-0" if worker == 0 else None)
    assert "MEGASCALE_SLICE_ID" not in env
    assert (env["RAY_AUTH_MODE"], env["RAY_AUTH_TOKEN_PATH"], env["PATH"]) == ("token", "/state/token", "/bin")
    assert (env["TPU_NAME"], env["TPU_WORKER_ID"], env["TPU_TOPOLOGY"]) == ("mine-0", str(worker), "2x2x2")
    command = ray_start_command(identity, SETTINGS, Path("/tmp/x"))
    (resources,) = [json.loads(word.split("=", 1)[1]) for word in command if word.startswith("--resources=")]
    assert resources == {"TPU": 4} | ({"podlaunch-slice-v4-16": 1} if worker == 0 else {})


def test_restart_delays_grow_to_a_limit() -> None:
    assert list(itertools.islice(restart_delays(), 7)) == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def wait_for_end(record: ProcessRecord) -> None:
    reap(record)
    psutil.wait_procs([psutil.Process(record.pid)] if record.alive() else [], timeout=20)


class World:
    """What an agent meets: a metadata server, a head, the Cloud TPU API, and processes; one clock for all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = 1000.0
        self.metadata = {"instance/preempted": "FALSE", "instance/maintenance-event": "NONE"}
        self.head = True
        self.silence = Answer.SILENT
        self.deleted: list[str] = []
        self.started: list[ProcessRecord] = []
        self.companions: list[ProcessRecord] = []
        self.program = "import time; time.sleep(60)"

    def fetch(self, path: str) -> str:
        if path not in self.metadata:
            raise ClusterError("404")
        return self.metadata[path]

    def start(self) -> ProcessRecord:
        command = [sys.executable, "-c", self.program]
        self.started.append(spawn(command, marker="test-agent", env={}, log=self.folder / "out", cwd=self.folder))
        return self.started[-1]

    def start_companion(self) -> ProcessRecord:
        command = [sys.executable, *read_companion(self.folder)]
        self.companions.append(spawn(command, marker="test-agent", env={}, log=self.folder / "out", cwd=self.folder))
        return self.companions[-1]

    def delete_queued_resource(self, zone: str, name: str) -> str:
        self.deleted.append(f"{zone}/{name}")
        return "operation"

    def delete_node(self, zone: str, name: str) -> str:
        raise AssertionError("it was a queued resource")

    def agent(self, worker: int = 0, *, may_join: bool = True) -> HostAgent:
        identity = HostIdentity("mine-0", worker, ("10.0.0.1", "10.0.0.2"), "v4-16", "2x2x2")

        def clock() -> float:
            return self.now

        return HostAgent(
            identity,
            self.folder,
            HostRay(self.start, self.folder, clock),
            HostRay(self.start_companion, self.folder / "companion", clock, what="the companion"),
            NoticeWatch(self.fetch, clock, 30.0),
            HeadWatch(lambda: Answer.THERE if self.head else self.silence, clock, 10.0),
            OwnSlice("mine-0", "us-central2-b", lambda: self, clock, owned=True),
            1800.0,
            clock,
            may_join=may_join,
        )

    def pass_time(self, agent: HostAgent, seconds: float) -> None:
        for _ in range(int(seconds / 10)):
            self.now += 10
            tick(agent)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    kill_members("test-agent")
    for record in made.started:
        reap(record)


def test_a_host_joins_when_the_head_is_there_and_not_before(world: World) -> None:
    world.head = False
    agent = world.agent()
    world.pass_time(agent, 60)
    assert world.started == []
    world.head = True
    world.pass_time(agent, 60)
    assert len(world.started) == 1


def test_a_notice_is_written_down_and_drains_ray_which_does_not_come_back(world: World) -> None:
    agent = world.agent()
    tick(agent)
    world.metadata["instance/preempted"] = "TRUE"
    tick(agent)
    notice = read_notice(world.folder)
    assert notice is not None
    assert (notice.kind, notice.deadline) == (NoticeKind.PREEMPTED, world.now + 30)
    psutil.wait_procs([psutil.Process(one.pid) for one in world.started if one.alive()], timeout=20)
    world.pass_time(agent, 600)
    assert len(world.started) == 1


def test_maintenance_that_is_taken_back_lets_ray_start_again(world: World) -> None:
    agent = world.agent()
    world.metadata["instance/maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    tick(agent)
    assert read_notice(world.folder) is not None
    world.metadata["instance/maintenance-event"] = "NONE"
    world.pass_time(agent, 10)
    assert read_notice(world.folder) is None
    assert len(world.started) == 1


def test_what_is_in_memory_is_written_in_the_last_second(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[float] = []
    monkeypatch.setattr("os.sync", lambda: synced.append(world.now))
    agent = world.agent()
    world.metadata["instance/preempted"] = "TRUE"
    began = world.now
    for _ in range(40):
        tick(agent)
        world.now += 1
    assert synced == [began + 30 - FLUSH_BEFORE_S]


@pytest.mark.parametrize("worker", [0, 1])
def test_a_slice_deletes_itself_when_the_head_is_gone_worker_0_first(world: World, worker: int) -> None:
    agent = world.agent(worker)
    tick(agent)
    world.head = False
    limit = 1800 + (0 if worker == 0 else OTHERS_DELAY_S)
    world.pass_time(agent, limit)
    assert world.deleted == []
    world.pass_time(agent, 10)
    assert world.deleted == ["us-central2-b/mine-0"]


def test_a_head_that_is_away_for_a_while_costs_nothing(world: World) -> None:
    agent = world.agent()
    tick(agent)
    for _ in range(10):
        world.head = False
        world.pass_time(agent, 1000)
        world.head = True
        world.pass_time(agent, 10)
    assert world.deleted == []


def test_what_a_run_wants_beside_ray_is_kept_alive_taken_over_and_ended(world: World) -> None:
    (world.folder / "companion").mkdir()
    agent = world.agent()
    tick(agent)
    assert not world.companions
    write_companion(world.folder, ["-c", "import time; time.sleep(60)"])
    tick(agent)
    (first,) = world.companions
    os.kill(first.pid, signal.SIGKILL)
    wait_for_end(first)
    world.pass_time(agent, 60)
    _, second = world.companions
    assert second.alive()
    later = world.agent()
    world.pass_time(later, 60)
    assert len(world.companions) == 2
    later.end()
    assert not second.alive()


def test_a_host_that_may_not_join_starts_no_ray_and_keeps_its_slice(world: World) -> None:
    agent = world.agent(may_join=False)
    world.pass_time(agent, 600)
    assert (world.started, world.deleted) == ([], [])
    world.pass_time(world.agent(), 20)
    assert len(world.started) == 1, "the same host, when it may"


@pytest.mark.parametrize(("silence", "started"), [(Answer.REFUSED, 2), (Answer.SILENT, 1)])
def test_ray_is_started_anew_for_a_new_head_and_left_alone_after_a_silence(world: World, silence: Answer, started: int) -> None:
    agent = world.agent(0)
    world.pass_time(agent, 600)
    world.silence, world.head = silence, False
    world.pass_time(agent, 20)
    assert [len(world.started), world.started[0].alive()] == [1, True], "what runs there goes on for as long as it can"
    world.head = True
    world.pass_time(agent, 30)
    assert len(world.started) == started
    assert world.started[-1].alive()
    if started == 2:
        wait_for_end(world.started[0])  # it was killed; the kernel takes a moment
    assert (not world.started[0].alive()) is (started == 2)


def test_a_host_whose_ray_cannot_be_kept_up_gives_its_slice_up(world: World) -> None:
    world.program = "raise SystemExit(1)"
    agent = world.agent()
    for _ in range(400):
        if world.deleted:
            break
        tick(agent)
        psutil.wait_procs([p for r in world.started[-1:] if r.alive() for p in [psutil.Process(r.pid)]], timeout=20)
        world.now += 5
    assert world.deleted == ["us-central2-b/mine-0"]
    assert len(world.started) > FAILURES


def tick(agent: HostAgent) -> None:
    for step in agent.steps:
        step()


def test_an_agent_goes_on_after_an_error_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []

    def broken() -> None:
        raise ValueError("a bug")

    rounds = Rounds([broken, lambda: done.append(1)])
    for _ in range(5):
        rounds.next()
    assert len(done) == 5, "the other steps are done"
    assert caplog.text.count("ValueError: a bug") == 1, "told once, not every second"


def run_script(home: Path, bundle: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-c", startup_script(bundle)], env={"PODLAUNCH_HOME": str(home)}, capture_output=True, text=True, timeout=20
    )


def test_the_startup_script_runs_the_agent_of_a_matching_image_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')  # exit code 0: it was told to end
    python.chmod(0o755)
    (tmp_path / "bundle.sha256").write_text("abc\n")
    assert run_script(tmp_path, "abc").stdout == "-m cluster.vm.host_agent\n"
    other = run_script(tmp_path, "def")
    assert other.returncode == 1
    assert "holds the bundle 'abc', the cluster wants 'def'" in other.stderr


AGENT = """#!/bin/sh
echo started >> "$PODLAUNCH_HOME/lives"
trap 'echo ended >> "$PODLAUNCH_HOME/lives"; exit 0' TERM
echo $$ > "$PODLAUNCH_HOME/pid"
sleep 60 & wait $!
"""


def test_the_startup_script_starts_a_dead_agent_again_and_passes_sigterm_on(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(AGENT)
    python.chmod(0o755)
    (tmp_path / "bundle.sha256").write_text("abc\n")
    lives = tmp_path / "lives"
    env = {"PODLAUNCH_HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    script = subprocess.Popen(["bash", "-c", startup_script("abc")], env=env, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for_lives(lives, 1)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        wait_for_lives(lives, 2)
        script.terminate()
        assert script.wait(20) == 0
    finally:
        os.killpg(script.pid, signal.SIGKILL)  # the `sleep` of the killed agent
    assert lives.read_text().split() == ["started", "started", "ended"]


def wait_for_lives(lives: Path, count: int) -> None:
    deadline = time.monotonic() + 20
    while not lives.exists() or lives.read_text().count("started") < count or not (lives.parent / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)  # another process's file
