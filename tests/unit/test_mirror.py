"""What a host has of a run directory on gs://, and what it sends there."""

import dataclasses
import os
import queue
import shutil
import sys
import threading
from pathlib import Path

import pytest

from cluster.cloud_errors import CloudError
from cluster.storage import storage_environment
from launcher import code
from launcher.compose import compose_config, load
from launcher.config import LaunchConfig
from launcher.gang.child import Child, Event
from launcher.gang.mirror import REPLACE_INTERVAL_S, Mirror, open_place
from launcher.profiles import ProfileRequest, trace_name
from launcher.run_files import ObjectFiles
from launcher.runs import RunDirectory


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run(endpoint: str, tmp_path: Path) -> RunDirectory:
    run = RunDirectory(f"gs://runs-bucket/{tmp_path.name}/a-run", endpoint)
    run.create(load(compose_config([])))
    run.write_code(code.pack(None))
    return run


def mirror_of(run: RunDirectory, host: int, tmp_path: Path, clock: Clock | None = None) -> Mirror:
    assert isinstance(run.files, ObjectFiles)
    return Mirror(run, run.files, tmp_path / "scratch" / str(host), host, tmp_path / "cache", clock or Clock())


def write(mirror: Mirror, name: str, content: str) -> None:
    path = mirror.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(content)


def test_a_host_gets_the_config_and_the_code_and_nothing_of_the_attempt_before(run: RunDirectory, tmp_path: Path) -> None:
    run.append_event({"event": "failure"})
    mirror = mirror_of(run, 0, tmp_path)
    assert mirror.fetch(0) == run.read_code()
    write(mirror, "metrics.jsonl", "old\n")
    mirror.fetch(1)
    assert not (mirror.folder / "metrics.jsonl").exists()
    assert LaunchConfig.from_yaml(mirror.folder / "config.yaml") == run.config()
    assert [event["event"] for event in RunDirectory(mirror.folder).events()] == ["failure"]
    assert mirror.checkpoints == f"{run.url}/checkpoints"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_users_data_travels_with_the_run(run: RunDirectory, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "mine"
    if kind == "file":
        path.write_text("some text\n")
    else:
        (path / "deep").mkdir(parents=True)
        (path / "deep" / "a.txt").write_text("some text\n")
    config = load(compose_config(["data=text", f"data.path={path}"]))
    archive = code.pack_data(config.training.data)
    assert archive is not None
    run.create(config)
    run.write_data(archive)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    mirror = mirror_of(run, 1, tmp_path)
    mirror.fetch(0)
    there = LaunchConfig.from_yaml(mirror.folder / "config.yaml").training.data.path
    assert there is not None
    assert (Path(there) if kind == "file" else Path(there) / "deep" / "a.txt").read_text() == "some text\n"


def test_what_every_host_has_is_not_sent_along_and_what_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(compose_config([])).training.data
    assert code.pack_data(config) is None
    (tmp_path / "big").write_text("x" * 3000)
    monkeypatch.setattr(code, "MAX_DATA_BYTES", 2048)
    with pytest.raises(Exception, match="too much to be sent along"):
        code.pack_data(dataclasses.replace(config, source="text", path=str(tmp_path / "big")))


def test_growing_files_are_sent_by_whole_lines_and_the_rest_at_the_end(run: RunDirectory, tmp_path: Path) -> None:
    mirror = mirror_of(run, 0, tmp_path)
    mirror.fetch(2)
    write(mirror, "logs/2/host-0.log", "one\ntw")
    write(mirror, "metrics.jsonl", '{"step": 1}\n')
    mirror.send()
    mirror.send()
    assert run.read_log(2, 0) == b"one\n"
    write(mirror, "logs/2/host-0.log", "o\nthree, killed here")
    mirror.finish()
    assert run.read_log(2, 0) == b"one\ntwo\nthree, killed here"
    assert list(run.metrics()) == [{"step": 1}]
    assert len(run.files.list("")) == len(set(run.files.list("")))


def test_only_host_0_sends_what_belongs_to_the_run(run: RunDirectory, tmp_path: Path) -> None:
    mirror = mirror_of(run, 1, tmp_path)
    mirror.fetch(0)
    for name in ("metrics.jsonl", "tensorboard/events", "export/config.json", "logs/0/host-1.log"):
        write(mirror, name, "x\n")
    mirror.send()
    mirror.finish()
    assert set(run.files.list("")) == {"config.yaml", "code.zip", "logs/0/host-1.log", "logs/0/host-1.times"}


def test_tensorboard_is_replaced_now_and_then_and_the_model_once(run: RunDirectory, tmp_path: Path) -> None:
    clock = Clock()
    mirror = mirror_of(run, 0, tmp_path, clock)
    mirror.fetch(0)
    write(mirror, "tensorboard/events", "a")
    mirror.send()
    write(mirror, "tensorboard/events", "b")
    mirror.send()
    assert run.files.read("tensorboard/events") == b"a", "a short time ago"
    clock.now += REPLACE_INTERVAL_S
    mirror.send()
    assert run.files.read("tensorboard/events") == b"ab"
    write(mirror, "export/model.safetensors", "weights")
    mirror.send()
    assert run.files.read("export/model.safetensors") is None
    mirror.finish()
    assert run.files.read("export/model.safetensors") == b"weights"
    assert not (mirror.folder / "export").exists()


def test_what_could_not_be_sent_is_sent_later(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = mirror_of(run, 0, tmp_path)
    mirror.fetch(0)
    write(mirror, "logs/0/host-0.log", "one\n")
    with monkeypatch.context() as broken:

        def fail(name: str, content: bytes) -> None:
            raise CloudError(f"no way with {len(content)} bytes", resource=name)

        broken.setattr(run.files, "append", fail)
        with pytest.raises(CloudError):
            mirror.send()
    mirror.send()
    assert run.read_log(0, 0) == b"one\n"


def test_a_process_that_is_killed_has_said_all_when_its_end_is_told(run: RunDirectory, endpoint: str, tmp_path: Path) -> None:
    mirror = mirror_of(run, 0, tmp_path)
    mirror.fetch(0)
    events: queue.Queue[Event] = queue.Queue()
    program = "import os, signal; print('last words', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    log = mirror.folder / run.log_name(0, 0)
    Child([sys.executable, "-c", program], dict(os.environ) | storage_environment(endpoint), log, events, mirror)
    found = events.get(timeout=30)
    assert (found["event"], found["code"], found["last_line"]) == ("exit", -9, "last words")
    assert run.read_log(0, 0) == b"last words\n"


def test_a_place_that_does_not_answer_delays_the_end_and_hides_nothing(run: RunDirectory, tmp_path: Path) -> None:
    class Silent:
        folder, checkpoints, files = tmp_path, "", run.files

        def fetch(self, attempt: int) -> bytes:
            raise NotImplementedError

        def keep_sending(self, ended: threading.Event) -> None:
            ended.wait()

        def finish(self) -> None:
            raise CloudError("nobody there", resource="here")

    events: queue.Queue[Event] = queue.Queue()
    Child([sys.executable, "-c", "pass"], dict(os.environ), tmp_path / "log", events, Silent())
    assert [events.get(timeout=30)["event"] for _ in range(2)] == ["unsent", "exit"]


def test_a_local_run_directory_is_used_as_it_is(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "r").write_code(b"zip")
    place = open_place(str(tmp_path / "r"), 0, tmp_path / "cache")
    assert (place.folder, place.checkpoints, place.fetch(0)) == (tmp_path / "r", str(tmp_path / "r" / "checkpoints"), b"zip")


def test_a_profile_of_any_host_is_sent_at_once_and_whole(run: RunDirectory, tmp_path: Path) -> None:
    request = ProfileRequest("2026_01_02", 3)
    mirrors = [mirror_of(run, host, tmp_path) for host in (0, 1)]
    for host, mirror in enumerate(mirrors):
        mirror.fetch(0)
        write(mirror, ".profile-x/plugins/half.xplane.pb", "not finished")
        write(mirror, trace_name(request.id, host), f"trace {host}")
        mirror.send()
        assert run.files.read(trace_name(request.id, host)) == f"trace {host}".encode()
    assert run.traces(request) == ["host-0.xplane.pb", "host-1.xplane.pb"]
    assert not [name for name in run.files.list("") if "half" in name]
