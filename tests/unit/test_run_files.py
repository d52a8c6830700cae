"""The files of a run directory: the same contract below a folder and below gs://."""

import itertools
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.cloud_errors import NotFoundError
from cluster.errors import ConfigError, PodlaunchError
from cluster.storage import split_url
from launcher.compose import compose_config, load
from launcher.run_files import LocalFiles, ObjectFiles, RunFiles, RunRoot, open_files
from launcher.runs import RunDirectory, RunState, RunStatus, find_run, list_runs


@pytest.fixture(params=["folder", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str | None]:
    """Where runs lie, and the endpoint that leads there."""
    if request.param == "folder":
        return str(tmp_path / "runs"), None
    return f"gs://runs-bucket/{tmp_path.name}", request.getfixturevalue("endpoint")


@pytest.fixture
def files(root: tuple[str, str | None]) -> RunFiles:
    url, endpoint = root
    return open_files(f"{url}/a-run", endpoint)


def test_a_file_is_replaced_and_removed(files: RunFiles) -> None:
    assert files.read("status.json") is None
    for content in (b"old", b"new"):
        files.write("status.json", content)
        assert files.read("status.json") == content
    files.remove("status.json")
    files.remove("status.json")
    assert files.read("status.json") is None


def test_of_many_claims_at_once_one_wins_and_its_content_stands(files: RunFiles) -> None:
    contents = [f"claimant {index}".encode() for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda content: files.create("attempts/3", content), contents))
    assert sum(won) == 1
    assert files.read("attempts/3") == contents[won.index(True)]
    assert files.list("attempts") == ["3"], "nothing is left of those who lost"


def test_a_growing_file_is_told_line_by_line_once(files: RunFiles) -> None:
    tail = files.tail("events.jsonl")
    assert list(tail()) == []
    files.append("events.jsonl", b"one\n")
    files.append("events.jsonl", b"two\nthree\n")
    assert list(tail()) == [b"one\n", b"two\n", b"three\n"]
    assert list(tail()) == []
    files.append("events.jsonl", b"four\n")
    assert list(tail()) == [b"four\n"]
    assert files.read_grown("events.jsonl") == b"one\ntwo\nthree\nfour\n"
    assert files.list("") == ["events.jsonl"]


def test_segments_keep_their_order_when_the_clock_stands_still(endpoint: str) -> None:
    still = itertools.repeat(1_000)
    files = ObjectFiles("gs://runs-bucket/still", endpoint, clock=lambda: next(still))
    for index in range(12):
        files.append("metrics.jsonl", f"{index}\n".encode())
    assert files.read_grown("metrics.jsonl").split() == [str(index).encode() for index in range(12)]


def test_a_run_is_written_listed_and_found(root: tuple[str, str | None]) -> None:
    url, endpoint = root
    assert list_runs(url, endpoint) == []
    for name in ("first", "second"):
        run = RunDirectory(f"{url}/{name}", endpoint)
        run.create(load(compose_config([])))
        run.write_status(RunStatus(run_id=name, cluster="local", state=RunState.QUEUED))
        run.append_event({"event": "state", "state": "QUEUED"})
        run.files.append(run.log_name(0, 0), b"hello\n")
        run.files.append(run.log_name(1, 11), b"again\n")
    assert {run.run_id for run in list_runs(url, endpoint)} == {"first", "second"}
    found = find_run(url, "second", endpoint)
    assert found.config() == load(compose_config([]))
    status = found.status()
    assert status is not None
    assert status.state is RunState.QUEUED
    assert [event["state"] for event in found.events()] == ["QUEUED"]
    assert found.logs() == {0: [0], 1: [11]}
    assert found.read_log(1, 11) == b"again\n"
    assert not found.stop_requested()
    found.request_stop()
    assert found.stop_requested()
    found.clear_stop_request()
    assert not found.stop_requested()
    with pytest.raises(ValueError, match="no transition"):
        found.write_status(RunStatus(run_id="second", cluster="local", state=RunState.SUCCEEDED))
    with pytest.raises(PodlaunchError, match="no run 'third' in"):
        find_run(url, "third", endpoint)
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        RunDirectory(f"{url}/third", endpoint).config()


def test_a_run_is_found_by_its_place_from_anywhere(root: tuple[str, str | None]) -> None:
    url, endpoint = root
    RunDirectory(f"{url}/mine", endpoint).create(load(compose_config([])))
    assert find_run("elsewhere", f"{url}/mine", endpoint).url == f"{url}/mine"


def test_a_bucket_that_is_not_there_is_named(endpoint: str) -> None:
    with pytest.raises(NotFoundError, match="create the bucket"):
        RunRoot("gs://no-such-bucket/runs", endpoint).names()


@pytest.mark.parametrize("url", ["s3://bucket/x", "gs:/bucket", "gs://", "bucket/x"])
def test_what_is_no_place_of_cloud_storage_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="gs://<bucket>"):
        split_url(url)


def test_a_line_that_does_not_fit_on_the_disk_is_not_there_at_all(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    files.append("events.jsonl", b"one\n")
    least, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, most))  # the kernel takes what fits, as it does on a full disk
    try:
        with pytest.raises(OSError, match="No space left on device"):
            files.append("events.jsonl", b"two\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (least, most))
    files.append("events.jsonl", b"two\n")
    assert files.read("events.jsonl") == b"one\ntwo\n"
