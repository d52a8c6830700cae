"""What `tpu stop` makes of the runs of its cluster."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster import clusters
from cluster.clusters import Cluster
from launcher.cli.main import app
from launcher.cli.stop import SUSPEND_LIMIT_S, suspend, unfinished_runs
from launcher.index import Entry, index_of
from launcher.runs import RunDirectory, RunState, RunStatus, StopRequest
from tests.unit.fake_head import CONFIG, Head


def make_run(folder: Path, name: str, state: RunState, cluster: str = "c") -> RunDirectory:
    run = RunDirectory(folder / name)
    run.path.mkdir()
    run.write_status(RunStatus(name, cluster, state, job=name))
    index_of(CONFIG).write(Entry(run.url, None, ["HF_TOKEN"]))
    return run


def state_of(run: RunDirectory) -> RunState:
    status = run.status()
    assert status is not None
    return status.state


class Clock:
    """Calls `act` at each sleep."""

    def __init__(self, act: Callable[[float], None] = lambda _: None) -> None:
        self.now, self._act = 0.0, act

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._act(self.now)


def test_runs_are_found_without_their_head(cluster: Cluster, head: Head, tmp_path: Path) -> None:
    head.server.shutdown()
    head.server.server_close()
    states = (RunState.RUNNING, RunState.SUSPENDED, RunState.SUCCEEDED)
    one, two, _ = [make_run(tmp_path, state.lower(), state) for state in states]
    make_run(tmp_path, "elsewhere", RunState.RUNNING, cluster="another")
    assert [run.url for run in unfinished_runs(cluster)] == [one.url, two.url]


def test_runs_are_waited_for_until_they_have_checkpointed(cluster: Cluster, tmp_path: Path) -> None:
    run, done = make_run(tmp_path, "one", RunState.RUNNING), make_run(tmp_path, "two", RunState.SUSPENDED)

    def checkpoint(now: float) -> None:
        if now > 5:
            run.write_status(RunStatus("one", "c", RunState.SUSPENDED))

    clock, said = Clock(checkpoint), list[str]()
    suspend([run, done], said.append, clock=clock, sleep=clock.sleep)
    assert 5 < clock.now < 6
    assert said == ["waiting for 1 runs to checkpoint"]
    assert (run.stop_requested(), done.stop_requested()) == (StopRequest.SUSPEND, None)


def test_a_run_that_does_not_checkpoint_holds_nobody_up_for_ever(cluster: Cluster, tmp_path: Path) -> None:
    run = make_run(tmp_path, "one", RunState.RUNNING)
    clock, said = Clock(), list[str]()
    suspend([run], said.append, clock=clock, sleep=clock.sleep)
    assert SUSPEND_LIMIT_S <= clock.now < SUSPEND_LIMIT_S + 1
    assert "it will go on from an earlier checkpoint" in said[-1]


@pytest.mark.parametrize(("arguments", "state", "kept"), [((), RunState.STOPPED, 0), (("--keep-runs",), RunState.SUSPENDED, 1)])
def test_a_stop_names_its_runs_and_gives_them_their_state_before_the_head_goes(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], state: RunState, kept: int
) -> None:
    run = make_run(tmp_path, "one", RunState.RUNNING)
    seen: list[RunState] = []
    monkeypatch.setattr(clusters, "list_clusters", lambda: [cluster])
    monkeypatch.setattr(clusters, "stop", lambda *_: seen.append(state_of(run)))
    monkeypatch.setattr("launcher.cli.stop.suspend", lambda *_: None)
    result = CliRunner().invoke(app, ["stop", "c", "-y", *arguments])
    assert result.exit_code == 0, result.output
    assert seen == [state]
    assert len(index_of(CONFIG).entries()) == kept
    assert f"unfinished run, will be {state}: {run.url}" in result.output.replace("\n", "")
