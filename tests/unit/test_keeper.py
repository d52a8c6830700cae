"""What the keeper does about runs: Ray's job server is a table of the test's own, the clock as well."""

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from cluster.config import ClusterConfig
from cluster.errors import ClusterError
from cluster.ray_http import HeadRefused, RayHttp
from cluster.secret_place import SecretPlace
from cluster.vm.companion import Beside
from launcher.attempts import claim_next, submit_next
from launcher.claims import Claims
from launcher.config import LaunchConfig
from launcher.data.config import DataConfig
from launcher.gang.keeper import (
    HEALTHY_S,
    LONGEST_PAUSE_S,
    MAX_LIVES,
    SUBMIT_GRACE_S,
    VERDICTS,
    Keeper,
    Standing,
    Verdict,
    lost_again,
    pause,
    standing,
)
from launcher.gang.lease import SILENCE_S
from launcher.index import Entry, RunIndex
from launcher.models.config import ModelConfig
from launcher.runs import FINAL, Recoveries, RunDirectory, RunState, RunStatus, StopRequest


class Ray:
    """A job server. Jobs live until `lose` or `forget_all`."""

    def __init__(self) -> None:
        self.jobs: dict[str, str] = {}
        self.posted: list[str] = []
        self.up = True
        self.refuses = False

    def get(self, path: str) -> Any:
        self._check()
        name = path.removeprefix("/api/jobs/")
        if not name:
            return [{"submission_id": job, "status": status} for job, status in self.jobs.items()]
        if name not in self.jobs:
            raise HeadRefused("no such job", 404)
        return {"status": self.jobs[name], "message": "Job entrypoint command failed with exit code 137\nlogs"}

    def post(self, path: str, body: Mapping[str, Any]) -> None:
        self._check()
        assert path == "/api/jobs/"
        if self.refuses:
            raise HeadRefused("not now", 500)
        self.posted.append(body["submission_id"])
        self.jobs[body["submission_id"]] = "RUNNING"

    def lose(self) -> None:
        self.jobs = dict.fromkeys(self.jobs, "FAILED")

    def forget_all(self) -> None:
        """Another head."""
        self.jobs = {}

    def _check(self) -> None:
        if not self.up:
            raise ClusterError("does not answer")


class World:
    def __init__(self, folder: Path) -> None:
        self.ray, self.now, self.folder = Ray(), 10_000.0, folder
        self.index = RunIndex(str(folder / "index"))
        self.keeper = Keeper("c", self.index, cast(RayHttp, self.ray), lambda: self.now)

    def run(self, name: str = "r", state: RunState = RunState.RUNNING, *, cluster: str = "c", **more: Any) -> RunDirectory:
        """A run that a command submitted, whose supervisor has come as far as `state`."""
        directory = RunDirectory(self.folder / name)
        config = ClusterConfig(name=cluster, accelerator_type="v4-16", cloud="emulated")
        directory.create(LaunchConfig(config, ModelConfig("gemma3-nano"), DataConfig("python_stdlib")))
        claimed = claim_next(directory)
        assert claimed is not None
        attempt, job = claimed
        status = RunStatus(name, cluster, RunState.QUEUED, attempt=attempt, job=job, phase="submitted", updated_at=self.now)
        secret = self.folder / f"{name}.secret"
        secret.touch()
        entry = Entry(str(directory.path), SecretPlace(file=str(secret)), ["HF_TOKEN"])
        submit_next(directory, entry, self.index, cast(RayHttp, self.ray), status)
        if state is not RunState.QUEUED:
            self.write(directory, RunState.STARTING)
            self.write(directory, state, **more)
        return directory

    def write(self, run: RunDirectory, state: RunState, **more: Any) -> None:
        """What its supervisor writes now."""
        values = {**self.status(run).to_dict(), "state": state, "updated_at": self.now, **more}
        run.write_status(RunStatus.from_dict({**values, "recoveries": values["recoveries"]}))

    def status(self, run: RunDirectory) -> RunStatus:
        status = run.status()
        assert status is not None
        return status

    def look(self, after: float = 1.0) -> None:
        self.now += after
        self.keeper.look()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_there_is_a_verdict_for_every_case() -> None:
    assert set(VERDICTS) == set(itertools.product(Standing, (True, False)))
    assert [case for case, verdict in VERDICTS.items() if verdict is Verdict.RESUBMIT] == [(Standing.UNFINISHED, False)]


@pytest.mark.parametrize("state", RunState)
def test_only_unfinished_runs_of_this_cluster_are_taken_up(state: RunState) -> None:
    def stands(**more: Any) -> Standing:
        values: dict[str, Any] = {"cluster": "c", "updated_at": 0.0, **more}
        return standing(RunStatus("r", state=state, **values), "c", stop_asked=False, now=1000.0)

    unfinished = state not in FINAL and state is not RunState.SUSPENDED
    assert (VERDICTS[stands(), False] is Verdict.RESUBMIT) is unfinished
    assert VERDICTS[stands(cluster="another"), False] in (Verdict.LEAVE, Verdict.SETTLE)
    fresh = stands(updated_at=1000.0 - SUBMIT_GRACE_S / 2)
    assert (VERDICTS[fresh, False] is Verdict.RESUBMIT) is (unfinished and state is not RunState.QUEUED)


def test_a_run_whose_supervisor_lives_is_left_alone(world: World) -> None:
    run = world.run()
    before = world.status(run)
    world.look(after=1000.0)
    assert world.ray.posted == ["r"]
    assert world.status(run) == before


@pytest.mark.parametrize("lost", ["supervisor", "head"])
def test_a_run_whose_supervisor_is_lost_goes_on_with_what_it_has_spent(world: World, lost: str) -> None:
    run = world.run(
        step=13, checkpoint=10, spent={"infrastructure": 2}, recoveries=Recoveries(infrastructure=2, preempted=4).__dict__, slices=["s"]
    )
    written = world.now
    if lost == "supervisor":
        world.ray.lose()
    else:
        world.ray.forget_all()
    world.look()
    assert world.ray.posted == ["r", "r-1"]
    status = world.status(run)
    assert (status.state, status.attempt, status.job) == (RunState.RECOVERING, 1, "r-1")
    assert (status.step, status.checkpoint, status.spent, status.slices) == (13, 10, {"infrastructure": 2}, [])
    assert status.recoveries == Recoveries(infrastructure=3, preempted=4)
    assert status.quiet_at == written + SILENCE_S
    assert Claims(run.files).holds("r-1")
    lost_event, recovering = run.events()
    assert (lost_event["event"], lost_event["attempt"], lost_event["step"]) == ("supervisor_lost", 0, 13)
    assert ("exit code 137" in lost_event["reason"]) is (lost == "supervisor")
    assert (recovering["state"], recovering["attempt"]) == ("RECOVERING", 1)
    (entry,) = world.index.entries()
    assert entry.secrets is not None
    assert Path(entry.secrets.file or "").exists(), "the next attempt needs them"
    world.look()
    assert world.ray.posted == ["r", "r-1"], "once"


def test_all_runs_of_a_lost_head_go_on(world: World) -> None:
    for name in ("one", "two", "three"):
        world.run(name)
    world.run("elsewhere", cluster="another")
    world.ray.forget_all()
    world.look()
    assert sorted(world.ray.jobs) == ["one-1", "three-1", "two-1"]


def test_a_head_that_does_not_answer_proves_nothing(world: World) -> None:
    run = world.run()
    world.ray.up = False
    with pytest.raises(ClusterError):
        world.look()
    assert world.status(run).state is RunState.RUNNING
    assert next(iter(run.events()), None) is None


@pytest.mark.parametrize("state", sorted(FINAL))
def test_an_ended_run_is_forgotten_with_its_secrets(world: World, state: RunState) -> None:
    world.run(state=state)
    world.ray.forget_all()
    world.look()
    assert world.index.entries() == []
    assert not (world.folder / "r.secret").exists()
    assert world.ray.posted == ["r"]


def test_a_suspended_run_waits_for_a_person(world: World) -> None:
    run = world.run(state=RunState.SUSPENDED)
    world.ray.forget_all()
    world.look(after=1e6)
    assert world.status(run).state is RunState.SUSPENDED
    (entry,) = world.index.entries()
    assert (entry.secrets, entry.secret_names) == (None, ["HF_TOKEN"])
    assert not (world.folder / "r.secret").exists()
    assert world.ray.posted == ["r"]


@pytest.mark.parametrize(("how", "state"), [(StopRequest.SAVE, RunState.STOPPED), (StopRequest.SUSPEND, RunState.SUSPENDED)])
def test_a_stop_that_nobody_heard_ends_the_run(world: World, how: StopRequest, state: RunState) -> None:
    run = world.run()
    run.request_stop(how)
    world.look()
    assert world.status(run).state is RunState.RUNNING, "its supervisor hears it"
    world.ray.forget_all()
    world.look()
    assert world.status(run).state is state
    assert world.ray.posted == ["r"]


def test_a_run_that_a_command_submits_right_now_is_left_to_it(world: World) -> None:
    run = world.run(state=RunState.QUEUED)
    world.ray.forget_all()
    world.look()
    assert world.ray.posted == ["r"]
    world.look(after=SUBMIT_GRACE_S)
    assert world.ray.posted == ["r", "r-1"]
    assert world.status(run).state is RunState.QUEUED
    assert world.status(run).recoveries.total == 0, "nothing of it had begun"


@pytest.mark.parametrize("before", [None, RunState.FAILED, RunState.SUSPENDED])
def test_what_a_command_has_begun_to_submit_is_left_to_it_and_in_the_end_forgotten(world: World, before: RunState | None) -> None:
    run = world.run(state=before or RunState.RUNNING)
    if before is None:
        (run.path / "status.json").unlink()
    assert claim_next(run) is not None
    (entry,) = world.index.entries()
    world.index.write(dataclasses.replace(entry, submitted_at=world.now))
    world.ray.lose()
    world.look(SUBMIT_GRACE_S - 1)
    assert world.index.find(run) is not None
    assert (world.folder / "r.secret").exists(), "it needs them in a moment"
    world.look(2)
    assert (world.index.find(run) is None) is (before is not RunState.SUSPENDED)
    assert not (world.folder / "r.secret").exists()
    assert world.ray.posted == ["r"]


def test_a_run_that_somebody_else_takes_up_at_the_same_time_is_left_to_them(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.run()
    world.ray.forget_all()
    monkeypatch.setattr("launcher.attempts.claim_next", lambda _: None)
    world.look()
    assert world.ray.posted == ["r"]
    assert world.status(run).attempt == 0


def test_an_end_that_is_written_while_the_keeper_looks_stands(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.run()
    world.ray.lose()

    def claim(directory: RunDirectory) -> tuple[int, str] | None:
        world.write(run, RunState.SUCCEEDED)
        return claim_next(directory)

    monkeypatch.setattr("launcher.attempts.claim_next", claim)
    world.look()
    assert world.ray.posted == ["r"]
    assert world.status(run).state is RunState.SUCCEEDED


def test_a_run_that_gets_nowhere_ends_with_the_reason_after_growing_pauses(world: World) -> None:
    run = world.run(step=13)
    submitted = []
    for _ in range(10_000):
        count = len(world.ray.posted)
        world.look()
        if len(world.ray.posted) > count:
            submitted.append(world.now)
        world.ray.lose()
        if world.status(run).state in FINAL:
            break
    status = world.status(run)
    assert status.state is RunState.FAILED
    assert status.reason is not None
    assert "without a step further than 13" in status.reason
    assert "exit code 137" in status.reason
    assert len(submitted) == MAX_LIVES
    waits = [second - first for first, second in itertools.pairwise(submitted)]
    assert waits == sorted(waits)
    assert waits[-1] > 8
    assert world.index.entries() == []


def test_a_head_that_refuses_is_asked_so_often_and_no_more(world: World) -> None:
    run = world.run()
    world.ray.forget_all()
    world.ray.refuses = True
    for _ in range(1000):
        world.look()
    assert world.status(run).state is RunState.FAILED


@pytest.mark.parametrize(("step", "lived", "lives"), [(13, 1.0, 4), (5, 1.0, 4), (14, 1.0, 1), (13, HEALTHY_S, 1)])
def test_a_step_further_or_a_long_life_begins_the_count_anew(step: int, lived: float, lives: int) -> None:
    entry = Entry("/r", lives=3, best_step=13, submitted_at=1000.0)
    again = lost_again(entry, RunStatus("r", "c", RunState.RUNNING, step=step), 1000.0 + lived)
    assert (again.lives, again.best_step) == (lives, max(13, step))


def test_the_first_loss_costs_no_pause() -> None:
    assert [pause(lives) for lives in range(7)] == [0.0, 0.0, 4.0, 8.0, 16.0, LONGEST_PAUSE_S, LONGEST_PAUSE_S]


def test_a_run_directory_that_cannot_be_read_does_not_keep_the_others_from_going_on(world: World) -> None:
    broken = world.run("a-broken-one")
    world.run("fine")
    (broken.path / "status.json").write_text("{")
    world.ray.forget_all()
    world.look()
    assert "fine-1" in world.ray.posted


def test_a_companion_is_told_of_its_head(tmp_path: Path) -> None:
    beside = Beside("c", "http://10.0.0.1:8265", tmp_path / "token")
    assert Beside.from_environment(beside.to_environment()) == beside
