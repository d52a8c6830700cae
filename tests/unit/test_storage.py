"""Cloud Storage: our client and Google's against the process beside the emulated cloud."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from google.api_core.exceptions import Forbidden

from cluster import processes
from cluster.cloud_errors import CredentialsError, DeadlineExceededError, NotFoundError, PermissionDeniedError
from cluster.emulator.storage import Storage, storage_binary, storage_marker
from cluster.state import private_dir
from cluster.storage import Bucket

SOON_S = 20.0


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield private_dir(tmp_path / "emulator")
    processes.kill_members(storage_marker(tmp_path / "emulator"))


@pytest.fixture
def storage(folder: Path) -> Iterator[Storage]:
    made = open_storage(folder)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def bucket(storage: Storage) -> Bucket:
    made = Bucket("my-bucket", storage.url, "my-project", patience=SOON_S)
    assert made.ensure("us-central2")
    return made


def open_storage(folder: Path) -> Storage:
    binary = storage_binary()
    assert binary is not None, "the extra dev has it"
    return Storage(folder, binary)


def pids(folder: Path) -> list[int]:
    return [process.pid for process in processes.members(storage_marker(folder))]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_object_is_stored_once_whoever_comes_second(bucket: Bucket, tmp_path: Path) -> None:
    assert bucket.upload_once(write(tmp_path / "a", "first"), "x/y")
    assert not bucket.upload_once(write(tmp_path / "b", "second"), "x/y")
    assert bucket.read("x/y") == b"first"


def test_of_many_claims_at_once_one_wins(bucket: Bucket, tmp_path: Path) -> None:
    files = [write(tmp_path / str(index), str(index)) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda path: bucket.upload_once(path, "claim"), files))
    assert sum(won) == 1
    assert bucket.read("claim") == str(won.index(True)).encode()


def test_large_file_is_sent_in_pieces_and_not_twice(bucket: Bucket, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(os.urandom(33 * 2**20))
    assert bucket.upload_once(large, "large")
    assert not bucket.upload_once(large, "large")
    assert bucket.read("large") == large.read_bytes()


def test_list_exists_and_delete(bucket: Bucket, tmp_path: Path) -> None:
    for name in ("a/1", "a/2", "b/1"):
        bucket.upload_once(write(tmp_path / "file", name), name)
    assert bucket.list("a/") == ["a/1", "a/2"]
    assert bucket.exists("b/1")
    assert bucket.delete("b/1")
    assert not bucket.delete("b/1")
    assert not bucket.exists("b/1")
    with pytest.raises(NotFoundError, match="gs://my-bucket/b/1"):
        bucket.read("b/1")


def test_ensure_finds_a_bucket_that_is_there(bucket: Bucket) -> None:
    assert not bucket.ensure()


def test_missing_bucket_is_named_with_the_way_out(storage: Storage, tmp_path: Path) -> None:
    missing = Bucket("no-bucket", storage.url, "my-project")
    with pytest.raises(
        NotFoundError, match=r"^gs://no-bucket/x: does not exist: Not Found; create the bucket \(gcloud storage buckets create\)"
    ) as error:
        missing.upload_once(write(tmp_path / "a", ""), "x")
    assert "\n" not in str(error.value)
    with pytest.raises(NotFoundError):
        missing.list()


def test_no_credentials_and_no_permission_say_what_to_grant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "missing.json"))
    with pytest.raises(CredentialsError, match="gcloud auth application-default login"):
        Bucket("my-bucket", None, "my-project").exists("x")

    class Denied:
        def list_blobs(self, *_: object, **__: object) -> None:
            raise Forbidden("me@x does not have storage.objects.list access")  # type: ignore[no-untyped-call]

    with pytest.raises(PermissionDeniedError, match=r"does not have storage.objects.list access; grant roles/storage.objectAdmin"):
        Bucket("my-bucket", client=Denied()).list()


def test_killed_process_comes_back_on_its_port_with_all_objects(bucket: Bucket, storage: Storage, folder: Path, tmp_path: Path) -> None:
    bucket.upload_once(write(tmp_path / "a", "kept"), "x")
    url, (pid,) = storage.url, pids(folder)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: pid not in pids(folder))
    storage.watch()
    assert storage.url == url
    assert bucket.read("x") == b"kept"  # the client repeats the request until it listens
    assert pids(folder) != [pid]


def test_process_that_dies_at_once_is_not_started_in_a_hurry(folder: Path) -> None:
    now = 1000.0
    crashing = Storage(folder, Path("/bin/false"), clock=lambda: now)
    crashing.start()
    starts = []
    for _ in range(20):  # ten seconds of looks
        before = (folder / "storage.json").read_text()
        eventually(lambda: not pids(folder))
        crashing.watch()
        starts += [now] if (folder / "storage.json").read_text() != before else []
        now += 0.5
    assert len(starts) == 4  # at 0, 1, 3 and 7 s


def test_next_daemon_takes_over_the_process_with_its_objects(bucket: Bucket, storage: Storage, folder: Path, tmp_path: Path) -> None:
    bucket.upload_once(write(tmp_path / "a", "kept"), "x")
    before = pids(folder)
    another = open_storage(folder)
    another.start()
    assert (another.url, pids(folder)) == (storage.url, before)
    another.stop()
    assert pids(folder) == []
    third = open_storage(folder)
    third.start()
    assert third.url == storage.url
    assert bucket.read("x") == b"kept"
    third.stop()


def test_unrecorded_process_on_the_port_is_replaced(storage: Storage, folder: Path) -> None:
    (old,) = pids(folder)
    record = (folder / "storage.json").read_text().replace(f'"pid": {old}', '"pid": 999999999')
    (folder / "storage.json").write_text(record)
    another = open_storage(folder)
    another.start()
    assert another.url == storage.url
    assert len(pids(folder)) == 1
    assert pids(folder) != [old]
    another.stop()


def test_unreachable_storage_answers_again_what_waited(bucket: Bucket, storage: Storage, tmp_path: Path) -> None:
    bucket.upload_once(write(tmp_path / "a", "kept"), "x")
    storage.set_reachable(False)
    impatient = Bucket("my-bucket", storage.url, "my-project", patience=0.5, request=0.2)
    with pytest.raises(DeadlineExceededError, match="check the network"):
        impatient.read("x")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(bucket.read, "x")
        storage.watch()  # does not take it for dead
        storage.set_reachable(True)
        assert waiting.result(timeout=SOON_S) == b"kept"


def test_who_has_all_the_patience_waits_for_as_long_as_the_storage_is_away(bucket: Bucket, storage: Storage) -> None:
    patient = Bucket("my-bucket", storage.url, "my-project", patience=None, request=0.1)
    storage.set_reachable(False)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(patient.write, "late", b"1")
        with pytest.raises(TimeoutError):
            writing.result(timeout=1.0)  # several requests
        storage.set_reachable(True)
        writing.result(timeout=SOON_S)
    assert bucket.read("late") == b"1"


def test_unreachable_storage_ends_when_it_is_told_to(storage: Storage, folder: Path) -> None:
    storage.set_reachable(False)
    storage.stop()
    assert pids(folder) == []
