"""Checkpoints where storage misbehaves, and on gs://: full disks, outages, killed saves, other numbers of hosts."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from launcher.training.checkpoint import CheckpointError, Checkpoints
from launcher.training.manifest import verify
from launcher.training.retention import Retention
from launcher.training.storage import COMMITTED, MANIFEST, LocalStorage, ObjectStorage
from tests.integration.checkpoint_states import check, open_checkpoints, save_all, state, target
from tests.integration.fake_gcs import BUCKET, FakeGcs
from tests.integration.test_training_job import Recorder, train
from tests.integration.training_gang import metrics, write_config

TWO_SAVES = ("restore=0", "save=20", "wait", "stdin", "save=40", "wait")
ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """Processes of tests/integration/checkpoint_worker.py."""

    def __init__(
        self, folder: str, *actions: str, processes: int = 1, devices: int = 2, environment: Mapping[str, str] | None = None
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
        command = [sys.executable, "-m", "tests.integration.checkpoint_worker", folder, "split", *actions]
        self.processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={
                    **os.environ,
                    "JAX_PLATFORMS": "cpu",
                    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                    "PODLAUNCH_COORDINATOR": coordinator,
                    "PODLAUNCH_NUM_PROCESSES": str(processes),
                    "PODLAUNCH_PROCESS_ID": str(index),
                    **(environment or {}),
                },
            )
            for index in range(processes)
        ]

    def until(self, text: str) -> None:
        """Read process 0's lines up to this one."""
        read: list[str] = []
        output = self.processes[0].stdout
        assert output is not None
        for line in output:
            read.append(line)
            if line.startswith(text):
                return
        raise AssertionError(f"it ended without {text!r}: {''.join(read)}")

    def go_on(self) -> None:
        stdin = self.processes[0].stdin
        assert stdin is not None
        stdin.write("\n")
        stdin.flush()

    def end(self, expected: int = 0) -> str:
        """The output of process 0, once all have ended as expected."""
        outputs = [process.communicate(timeout=120)[0] for process in self.processes]
        assert [process.returncode for process in self.processes] == [expected] * len(self.processes), "\n".join(outputs)
        return outputs[0]

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeGcs]:
    started = FakeGcs(tmp_path_factory.mktemp("gcs"))
    yield started
    started.stop()


@pytest.fixture
def here(server: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """gcsfs of this process talks to the server, and forgets it afterwards."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec
    from gcsfs import GCSFileSystem

    monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})  # the environment was read long ago
    GCSFileSystem.clear_instance_cache()
    yield
    GCSFileSystem.clear_instance_cache()


def place(name: str) -> str:
    return f"gs://{BUCKET}/{name}/checkpoints"


@pytest.fixture(scope="module")
def saved(server: FakeGcs) -> str:
    """Two processes of two devices each saved steps 20, 40 and 60, every array split over all of them."""
    folder = place("two")
    with Worker(folder, "restore=0", "save=20", "save=40", "save=60", "wait", processes=2, environment=server.environment) as worker:
        worker.end()
    return folder


def test_on_gs_two_hosts_save_and_one_restores_on_another_mesh(server: FakeGcs, saved: str) -> None:
    with Worker(saved, "restore=60", processes=1, devices=8, environment=server.environment) as worker:
        worker.end()


@pytest.mark.usefixtures("here")
def test_on_gs_damage_to_any_object_is_found_without_reading_it(server: FakeGcs, saved: str) -> None:
    storage = ObjectStorage(saved)
    prefix = f"{saved.removeprefix(f'gs://{BUCKET}/')}/60/"
    files = [name.removeprefix(prefix) for name in server.objects() if name.startswith(prefix)]
    assert len(files) > 10
    for file in files:
        content = storage.read("60", file)
        flipped = content[:-1] + bytes([content[-1] ^ 0x10])
        if file != COMMITTED:
            for damaged in (content[: len(content) // 2], b"", flipped):
                storage.write("60", file, damaged)
                assert verify(storage, "60") is not None, file
        storage._client.rm_file(f"{BUCKET}/{prefix}{file}")
        assert (verify(storage, "60") is None) == (file == COMMITTED)
        storage.finish("60")
        storage.write("60", file, content)
        assert verify(storage, "60") is None


@pytest.mark.usefixtures("here")
def test_on_gs_the_manifest_is_the_commit_and_what_has_none_is_cleaned_or_set_aside(server: FakeGcs, saved: str) -> None:
    """Killed while writing (no mark at all), killed right after the commit (no mark of Orbax's), and a manifest that was lost."""
    folder = place("torn")
    storage, source = ObjectStorage(folder), ObjectStorage(saved)
    for step in (20, 40, 60):
        for file in source.facts(str(step)):
            storage.write(str(step), file, source.read(str(step), file))
    for file in source.facts("60"):
        if file not in (MANIFEST, COMMITTED):
            storage.write("80", file, source.read("60", file))
    storage._client.rm_file(f"{storage._root}/60/{MANIFEST}")
    storage._client.rm_file(f"{storage._root}/40/{COMMITTED}")
    with Worker(folder, "restore=40", "save=60", "wait", devices=1, environment=server.environment) as worker:
        worker.end()
    assert sorted(storage.names()) == ["20", "40", "60", "60.bad-1"]
    assert set(storage.facts("60.bad-1")) == set(source.facts("60")) - {MANIFEST}


@pytest.mark.usefixtures("here")
def test_an_outage_shorter_than_the_retries_only_delays_a_save_and_never_blocks_training(server: FakeGcs) -> None:
    with Worker(place("outage"), *TWO_SAVES, environment=server.environment) as worker:
        worker.until("waiting")
        server.stop()
        worker.go_on()
        worker.until("saving")  # although nothing answers
        stopped = time.monotonic()
        time.sleep(4)  # the outage itself
        server.start()
        worker.end()
        assert time.monotonic() - stopped < 60
    assert [verify(ObjectStorage(place("outage")), step) for step in ("20", "40")] == [None, None]


@pytest.mark.usefixtures("here")
def test_storage_that_stays_away_is_an_error_and_the_last_good_checkpoint_stands(server: FakeGcs) -> None:
    folder = place("away")
    with Worker(
        folder, "restore=0", "save=20", "wait", "stdin", "save=40", "wait", environment={**server.environment, "SAVE_LIMIT_S": "5"}
    ) as worker:
        worker.until("waiting")
        server.stop()
        worker.go_on()
        told = worker.end(3).splitlines()[-1]
        server.start()
    assert told.startswith(f"checkpoint 40 could not be written to {folder} (the last good one is 20): ")
    storage = ObjectStorage(folder)
    assert verify(storage, "20") is None
    assert "40" not in set(storage.names()) - set(storage.leftovers())


class Forbidding(BaseHTTPRequestHandler):
    """A bucket that may not be read."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.mark.usefixtures("here")
def test_storage_that_may_not_be_read_is_an_error_and_no_reason_to_start_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), Forbidding) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{service.server_port}")
        checkpoints = open_checkpoints(place("forbidden"))
        with pytest.raises(CheckpointError, match=r"cannot be read: Forbidden: .*; nothing was changed, try again when they can"):
            checkpoints.restore(target())
        checkpoints.close()
        service.shutdown()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(checkpoints: Checkpoints) -> None:
    for step in range(20, 2000, 20):
        checkpoints.save(step, state(step))
        checkpoints.wait()


def grow(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


in_its_own_threads = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
"""Orbax's threads let an error out that they also hand over."""


@in_its_own_threads
def test_a_full_disk_is_an_error_at_the_next_step_and_leaves_no_torn_checkpoint(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    checkpoints = open_checkpoints(folder, retention=Retention(100))
    with pytest.raises(CheckpointError, match=r"No space left on device; free space") as caught:
        fill(checkpoints)
    checkpoints.close()
    good = checkpoints.newest
    assert good is not None
    assert f"(the last good one is {good})" in str(caught.value)
    assert "\n" not in str(caught.value)
    grow(small_disk, "2m")
    again = open_checkpoints(folder, retention=Retention(1))
    check(again.restore(target()), good)
    again.save(good + 20, state(good + 20))
    again.close()
    assert [path.name for path in folder.iterdir()] == [str(good + 20)]


@in_its_own_threads
def test_a_run_whose_disk_is_full_stops_at_the_next_step_with_one_line(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PODLAUNCH_CACHE_DIR", str(tmp_path / "cache"))
    grow(small_disk, "70m")  # one checkpoint of 41 MB and half of another
    run = write_config(small_disk / "run", steps=1000, checkpoint_every=2)
    with pytest.raises(CheckpointError, match=r"checkpoint 4 could not be written to .* \(the last good one is 2\): No space left"):
        train(run)
    assert verify(LocalStorage(run / "checkpoints"), "2") is None
    assert metrics(run)[-1]["step"] < 100


def test_a_save_killed_half_way_is_cleaned_and_the_one_before_is_used(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save_all(folder, [20])
    (folder / "40.orbax-checkpoint-tmp" / "d").mkdir(parents=True)
    (folder / "40.orbax-checkpoint-tmp" / "d" / "half").write_bytes(b"half")
    (folder / "1.deleting").mkdir()
    recorder = Recorder()
    checkpoints = open_checkpoints(folder, recorder)
    check(checkpoints.restore(target()), 20)
    checkpoints.close()
    assert recorder.named("checkpoint_set_aside") == []
    assert [path.name for path in folder.iterdir()] == ["20"]


def test_a_run_that_never_finished_a_save_starts_from_nothing(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "20.orbax-checkpoint-tmp").mkdir(parents=True)
    checkpoints = open_checkpoints(tmp_path / "checkpoints")
    assert checkpoints.restore(target()) is None
    checkpoints.close()


def test_old_checkpoints_go_and_milestones_stay(tmp_path: Path) -> None:
    recorder = Recorder()
    folder = tmp_path / "checkpoints"
    save_all(folder, [20, 40, 60, 80, 100, 120], reporter=recorder, retention=Retention(2, every=50))
    assert sorted(int(path.name) for path in folder.iterdir()) == [60, 100, 120]
    assert [event["step"] for event in recorder.named("checkpoint")] == [20, 40, 60, 80, 100, 120]
    assert all(0 < event["blocking_s"] < event["write_s"] for event in recorder.named("checkpoint"))


def test_two_local_hosts_share_the_verification_and_agree_on_the_step(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save_all(folder, [20, 40, 60])
    smallest = min((folder / "60").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 1 << 30)
    smallest.write_bytes(smallest.read_bytes()[:-1] + b"?")
    (folder / "40" / MANIFEST).unlink()
    with Worker(str(folder), "restore=20", "save=40", "wait", processes=2) as worker:
        worker.end()
    assert sorted(path.name for path in folder.iterdir()) == ["20", "40", "40.bad-1", "60.bad-1"]
