"""Submitting a run, and taking it up again; Ray's head is an HTTP server of the test's own."""

import dataclasses
import json
from pathlib import Path

import pytest

from cluster import clusters
from cluster.clusters import Cluster
from cluster.errors import ClusterError, ConfigError
from cluster.secret_place import SecretPlace
from launcher import alone, app
from launcher.attempts import end_run
from launcher.config import LaunchConfig, RunConfig
from launcher.data.config import DataConfig
from launcher.guard import guarded
from launcher.index import Entry, index_of
from launcher.models.config import ModelConfig
from launcher.runs import Recoveries, RunDirectory, RunState, RunStatus, StopRequest
from tests.unit.fake_head import CONFIG, Head


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "r")
    directory.create(LaunchConfig(CONFIG, ModelConfig("gemma3-nano"), DataConfig("python_stdlib")))
    directory.write_status(RunStatus("r", "c", RunState.QUEUED, job="job-1"))
    return directory


def test_a_submission_carries_names_of_secrets_and_never_values(
    cluster: Cluster, run: RunDirectory, head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    head.answers |= {"/api/jobs/": [], "POST /api/jobs/": {}}
    config = dataclasses.replace(run.config(), run=RunConfig(secrets=["HF_TOKEN", "NOT_SET"]))
    assert app.submit(cluster, run, config, b"zip") == "r-1"
    (posted,) = head.posted
    assert "s3cret" not in json.dumps(posted)
    metadata = {"job_name": "r", "run_directory": str(run.path), "cluster": "c", "attempt": "1", "total_steps": "60"}
    assert posted["metadata"] == metadata
    (file,) = (tmp_path / "state" / "clusters" / "c" / "secrets").iterdir()
    assert json.loads(file.read_text()) == {"HF_TOKEN": "s3cret"}
    assert file.stat().st_mode & 0o777 == 0o600
    assert str(file) in posted["entrypoint"]
    (entry,) = index_of(CONFIG).entries()
    assert (entry.run_directory, entry.secret_names, entry.secrets) == (run.url, ["HF_TOKEN"], SecretPlace(file=str(file)))


def test_a_refused_submission_ends_the_run_instead_of_leaving_it_queued(cluster: Cluster, run: RunDirectory, head: Head) -> None:
    config = run.config()
    head.answers["/api/jobs/"] = []
    with pytest.raises(ClusterError, match="refused"):
        app.submit(cluster, run, config, b"zip")
    status = run.status()
    assert status is not None
    assert status.state is RunState.FAILED
    assert index_of(CONFIG).entries() == []


def test_two_commands_do_not_start_one_run(cluster: Cluster, run: RunDirectory, head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    head.answers["/api/jobs/"] = []
    monkeypatch.setattr(app, "claim_next", lambda _: None)
    with pytest.raises(ClusterError, match="is being started by another command"):
        app.submit(cluster, run, run.config(), b"zip")
    assert head.posted == []


@pytest.fixture
def suspended(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """As `tpu stop --keep-runs` leaves it; it had been given a secret."""
    run.write_status(
        RunStatus("r", "c", RunState.STARTING, attempt=3, step=7, spent={"infrastructure": 2}, recoveries=Recoveries(infrastructure=2))
    )
    run.request_stop(StopRequest.SUSPEND)
    index_of(CONFIG).write(Entry(str(run.path), None, ["HF_TOKEN"]))
    end_run(run, RunState.SUSPENDED, "cluster 'c' was stopped", index_of(CONFIG))
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    return run


def bring_up(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(clusters, "up", lambda *_, **__: cluster)
    app.bring_up(cluster.config, said.append)
    return said


def test_a_suspended_run_goes_on_when_its_cluster_is_brought_up(
    cluster: Cluster, suspended: RunDirectory, head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    head.answers |= {"/api/jobs/": [], "POST /api/jobs/": {}}
    assert bring_up(cluster, monkeypatch) == [f"run {suspended.url} goes on"]
    status = suspended.status()
    assert status is not None
    assert (status.state, status.step, status.spent, status.recoveries.infrastructure) == (RunState.QUEUED, 7, {}, 2)
    assert status.job == head.posted[0]["submission_id"]
    assert not suspended.stop_requested()
    (entry,) = index_of(CONFIG).entries()
    assert entry.secrets is not None
    assert json.loads(entry.secrets.read()) == {"HF_TOKEN": "s3cret"}
    assert bring_up(cluster, monkeypatch) == [], "once"


@pytest.mark.parametrize(("missing", "words"), [("secret", "set that and bring"), ("slices", "up with slices of v4-32")])
def test_a_suspended_run_that_cannot_go_on_stays_and_says_why(
    cluster: Cluster, suspended: RunDirectory, head: Head, monkeypatch: pytest.MonkeyPatch, missing: str, words: str
) -> None:
    if missing == "secret":
        monkeypatch.delenv("HF_TOKEN")
    else:
        cluster = dataclasses.replace(cluster, config=dataclasses.replace(CONFIG, accelerator_type="v4-32"))
    (said,) = bring_up(cluster, monkeypatch)
    assert "stays SUSPENDED" in said
    assert words in said
    assert head.posted == []


def test_a_run_that_is_taken_up_again_keeps_its_account(cluster: Cluster, run: RunDirectory, head: Head) -> None:
    head.answers |= {"/api/jobs/": [], "POST /api/jobs/": {"submission_id": "r-1"}}
    before = RunStatus("r", "c", RunState.STOPPED, started_at=1000.0, updated_at=1100.0, ended_at=1100.0, highest_step=9)
    (run.path / "status.json").unlink(missing_ok=True)
    run.write_status(dataclasses.replace(before, phases={"training": 60.0, "compiling": 40.0}, costs={"training": 3.0}))
    app.submit(cluster, run, run.config(), b"zip")
    status = run.status()
    assert status is not None
    assert (status.state, status.started_at, status.highest_step, status.costs) == (RunState.QUEUED, 1000.0, 9, {"training": 3.0})
    assert {**status.phases, "idle": 0.0} == {"training": 60.0, "compiling": 40.0, "idle": 0.0}
    assert sum(status.phases.values()) == pytest.approx(status.updated_at - 1000.0), "it was idle since"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("trainer.lr is [wrong]"), 2, "error: trainer.lr is [wrong]"),
        (ClusterError("no head"), 1, "error: no head"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("by zero"), 1, "error: ZeroDivisionError: by zero (the traceback is in"),
    ],
)
def test_every_error_is_one_line_and_an_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def command() -> int:
        raise error

    assert guarded(command, "test") == code
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--nope"], "unrecognized arguments: --nope"),
        (["--cfg", "jobs"], "argument --cfg/-c: invalid choice: 'jobs'"),
        (["-m", "model=null,gemma"], "model=null: there is no such option"),
        (["-m", "trainer.lr=a,b"], "point 1 of the sweep (trainer.lr=a): trainer.lr: expected a number, got 'a'"),
    ],
)
def test_wrong_flags_and_sweeps_are_refused_in_one_line(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr("sys.argv", ["podlaunch", *words])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == ConfigError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert reason in line


def test_wrong_flags_of_training_alone_are_refused_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["--nope"], ["--devices", "many"], ["--devices", "0"]):
        monkeypatch.setattr("sys.argv", ["training", *words])
        with pytest.raises(SystemExit) as ended:
            alone.main()
        assert ended.value.code == ConfigError.exit_code
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert words[0] in line
