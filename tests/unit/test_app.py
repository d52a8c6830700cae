"""What becomes of a run whose supervisor is gone; Ray's head is an HTTP server of the test's own."""

import dataclasses
import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.clusters import Cluster
from cluster.config import ClusterConfig
from cluster.errors import ClusterError, ConfigError
from cluster.head_here import HereHead
from cluster.processes import ProcessRecord
from cluster.state import cluster_dir
from cluster.vm.bundle import Bundle
from cluster.vm.head_agent import HeadSettings
from launcher import app, jobs
from launcher.app import guarded
from launcher.config import DataConfig, LaunchConfig, ModelConfig
from launcher.runs import RunDirectory, RunState, RunStatus

BUNDLE = Bundle("bundle")
CONFIG = ClusterConfig(name="c", accelerator_type="v4-16", cloud="emulated")


class Head:
    """Answers what `answers` holds for a path, else 404; 401 without the token."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.posted: list[dict[str, Any]] = []
        head = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                head.answer(self, head.answers.get(self.path))

            def do_POST(self) -> None:
                head.posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                head.answer(self, head.answers.get(f"POST {self.path}"))

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @staticmethod
    def answer(handler: BaseHTTPRequestHandler, value: Any) -> None:
        known = handler.headers.get("Authorization") == "Bearer the-token"
        handler.send_response(401 if not known else 404 if value is None else 200)
        handler.end_headers()
        handler.wfile.write(json.dumps(value).encode())


@pytest.fixture
def head() -> Iterator[Head]:
    made = Head()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def cluster(head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Its agent is this very process, so it is alive."""
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path / "state"))
    folder = cluster_dir("c")
    (folder / "token").write_text("the-token\n")
    ip, port = "127.0.0.1", head.server.server_port
    settings = HeadSettings("c", "c-head", ip, ip, 1, port, 2, 3, str(folder / "token"), "", str(tmp_path))
    (folder / "process.json").write_text(json.dumps(vars(ProcessRecord(os.getpid(), psutil.Process().create_time(), "m"))))
    return Cluster(CONFIG, HereHead(CONFIG, BUNDLE, folder, settings), BUNDLE, 0.0)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "r")
    directory.create(LaunchConfig(CONFIG, ModelConfig("gemma3-nano"), DataConfig("python_stdlib")))
    directory.write_status(RunStatus("r", "c", RunState.QUEUED, job="job-1"))
    return directory


def gone(cluster: Cluster) -> Cluster:
    (cluster.folder / "process.json").write_text(json.dumps(vars(ProcessRecord(2**22 + 1, 0.0, "m"))))
    return cluster


def test_a_run_whose_job_lives_is_left_alone(cluster: Cluster, run: RunDirectory, head: Head) -> None:
    head.answers["/api/jobs/job-1"] = {"status": "RUNNING"}
    assert app.supervisor_gone(cluster, run) is None


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda head: head.answers.update({"/api/jobs/job-1": {"status": "FAILED"}, "/api/jobs/job-1/logs": {"logs": "a\nb"}}), "a | b"),
        (lambda head: None, "knows no job 'job-1'"),
    ],
)
def test_a_run_whose_job_ended_without_it_is_failed(
    cluster: Cluster, run: RunDirectory, head: Head, prepare: Callable[[Head], None], expected: str
) -> None:
    prepare(head)
    reason = app.supervisor_gone(cluster, run)
    assert reason is not None
    assert expected in reason
    app.end_orphan(run, RunState.FAILED, reason)
    status = run.status()
    assert status is not None
    assert (status.state, status.reason) == (RunState.FAILED, reason)
    assert app.supervisor_gone(cluster, run) is None, "it is final now"


def test_a_run_whose_head_is_gone_is_failed(cluster: Cluster, run: RunDirectory) -> None:
    for nobody in (None, gone(cluster)):
        assert app.supervisor_gone(nobody, run) == "the head of cluster 'c' is gone"


def test_a_head_that_does_not_answer_for_a_moment_fails_nothing(cluster: Cluster, run: RunDirectory, head: Head) -> None:
    head.server.shutdown()
    head.server.server_close()
    assert app.supervisor_gone(cluster, run) is None


def test_a_submission_carries_names_of_secrets_and_never_values(
    cluster: Cluster, run: RunDirectory, head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    head.answers["POST /api/jobs/"] = {"submission_id": "r"}
    assert jobs.submit(cluster, run, 0, ["HF_TOKEN", "NOT_SET"]) == "r"
    (posted,) = head.posted
    assert "s3cret" not in json.dumps(posted)
    assert posted["metadata"] == {"name": "r", "run_directory": str(run.path)}
    (file,) = (tmp_path / "state" / "clusters" / "c" / "secrets").iterdir()
    assert json.loads(file.read_text()) == {"HF_TOKEN": "s3cret"}
    assert file.stat().st_mode & 0o777 == 0o600
    assert str(file) in posted["entrypoint"]


def test_a_refused_submission_ends_the_run_instead_of_leaving_it_queued(cluster: Cluster, run: RunDirectory, head: Head) -> None:
    config = run.config()
    head.answers.clear()
    with pytest.raises(ClusterError, match="refused"):
        app.submit(cluster, run, config, b"zip")
    status = run.status()
    assert status is not None
    assert status.state is RunState.FAILED


def test_a_run_that_is_taken_up_again_keeps_its_account(cluster: Cluster, run: RunDirectory, head: Head) -> None:
    head.answers["POST /api/jobs/"] = {"submission_id": "r-1"}
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
