"""The points of a sweep become runs of a cluster; its head is an HTTP server of the test's own."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster import clusters
from cluster.clusters import Cluster
from cluster.errors import ConfigError
from cluster.processes import ProcessRecord
from launcher.config import LaunchConfig
from launcher.runs import RunState, RunStatus
from launcher.sweep import NotNow
from launcher.sweep_places import Place, Standing
from launcher.sweep_points import Point
from launcher.sweep_runs import ClusterRuns
from launcher.watch import HeadGone
from tests.unit.fake_head import CONFIG, Head


@pytest.fixture
def point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Point:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").touch()
    values: dict[str, Any] = {
        "cluster": CONFIG.to_dict(),
        "job": {"kind": "script", "entrypoint": "train.py --lr=1"},
        "run": {"name": "sweep-lr-1", "code": str(tmp_path / "code")},
    }
    return Point(3, ("trainer.lr=1",), LaunchConfig.from_dict(values))


@pytest.fixture
def runs(cluster: Cluster, head: Head, monkeypatch: pytest.MonkeyPatch) -> ClusterRuns:
    head.answers |= {"/api/jobs/": [], "POST /api/jobs/": {}}
    monkeypatch.setattr(clusters, "up", lambda *_, **__: cluster)
    return ClusterRuns(Console(file=io.StringIO()))


def place(runs: ClusterRuns, point: Point) -> Place:
    made = Place(point, runs.find(point))
    made.find()
    return made


def test_a_point_becomes_a_run_of_its_own_below_the_working_directory(runs: ClusterRuns, point: Point, head: Head, tmp_path: Path) -> None:
    one = place(runs, point)
    runs.check([one])
    assert not (tmp_path / "runs").exists(), "a check writes nothing"
    runs.bring_up([one])
    runs.start(one)
    assert one.run.url == str(tmp_path / "runs" / "sweep-lr-1")
    assert [posted["submission_id"] for posted in head.posted] == ["sweep-lr-1"]
    assert (one.run.config().run.name, one.run.config().run.resume) == ("sweep-lr-1", False)
    one.follow()
    assert one.standing is Standing.UNDER_WAY


def test_a_run_that_had_ended_goes_on_as_the_next_attempt(runs: ClusterRuns, point: Point, head: Head) -> None:
    one = place(runs, point)
    one.run.create(point.config)
    one.run.write_status(RunStatus("sweep-lr-1", "c", RunState.FAILED, step=7, attempt=0))
    one.find()
    runs.check([one])
    runs.bring_up([one])
    runs.start(one)
    assert [posted["submission_id"] for posted in head.posted] == ["sweep-lr-1-1"]
    status = one.run.status()
    assert status is not None
    assert (status.state, status.step) == (RunState.QUEUED, 7)
    assert one.run.config().run.resume


def test_a_point_that_cannot_be_started_is_named(runs: ClusterRuns, point: Point, tmp_path: Path) -> None:
    (tmp_path / "code" / "train.py").unlink()
    with pytest.raises(ConfigError, match=r"point 3 of the sweep \(trainer.lr=1\): job.entrypoint: there is no train.py in"):
        runs.check([place(runs, point)])


def test_a_point_whose_cluster_sees_no_files_of_this_machine_is_named(
    runs: ClusterRuns, point: Point, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PODLAUNCH_BUCKET", raising=False)
    cloud = dataclasses.replace(CONFIG, cloud="google")
    with pytest.raises(ConfigError, match=r"point 3 of the sweep \(trainer.lr=1\): run.root is missing: set PODLAUNCH_BUCKET"):
        runs.find(dataclasses.replace(point, config=dataclasses.replace(point.config, cluster=cloud)))


def test_a_head_that_is_away_is_waited_for_and_one_that_is_gone_is_not(
    runs: ClusterRuns, point: Point, head: Head, cluster: Cluster
) -> None:
    one = place(runs, point)
    runs.bring_up([one])
    head.answers.clear()
    with pytest.raises(NotNow, match="does not answer"):
        runs.start(one)
    record = ProcessRecord(2**22 + 1, 0.0, "m")
    (cluster.folder / "process.json").write_text(json.dumps(vars(record)))
    with pytest.raises(HeadGone):
        runs.start(one)
    assert not one.run.exists()


@pytest.mark.parametrize(("slices", "most", "expected"), [(1, 4, 4), (2, 4, 2), (2, 5, 2), (1, None, 1)])
def test_as_many_points_at_once_as_there_are_slices_for(
    runs: ClusterRuns, point: Point, slices: int, most: int | None, expected: int
) -> None:
    cluster = dataclasses.replace(CONFIG, slices=slices, max_slices=most)
    assert runs.most(dataclasses.replace(point, config=dataclasses.replace(point.config, cluster=cluster))) == expected


def test_a_cluster_that_is_up_has_as_many_slices_as_it_was_made_with(
    runs: ClusterRuns, point: Point, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = dataclasses.replace(cluster, config=dataclasses.replace(CONFIG, max_slices=3))
    monkeypatch.setattr(clusters, "up", lambda *_, **__: larger)
    runs.bring_up([place(runs, point)])
    assert runs.most(point) == 3
