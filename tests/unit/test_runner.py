"""The runner's child: events, exit codes, logs, and its death with its parent. Real processes, no Ray."""

import io
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from cluster.vm.host_dir import Notice, NoticeKind, write_notice
from launcher.gang.child import Child, Event
from launcher.gang.echo import echo
from launcher.gang.runner import Runner

TALK = """
import json, os, sys
print("to the log")
with os.fdopen(int(os.environ["PODLAUNCH_EVENT_FD"]), "w") as events:
    events.write(json.dumps({"event": "step", "step": 1}) + "\\nnot json\\n")
sys.exit(3)
"""
SLEEP = "import time; print('up', flush=True); time.sleep(60)"


def start(program: str, log: Path) -> tuple[Child, "queue.Queue[Event]"]:
    events: queue.Queue[Event] = queue.Queue()
    return Child([sys.executable, "-c", program], dict(os.environ), log, events), events


def test_a_child_says_events_and_ends_with_its_exit_code(tmp_path: Path) -> None:
    _, events = start(TALK, tmp_path / "logs" / "0" / "host-0.log")
    found = [events.get(timeout=20) for _ in range(3)]
    assert found[0] == {"event": "step", "step": 1}
    assert found[1] == {"event": "noise", "text": "not json"}
    assert (found[2]["event"], found[2]["code"], found[2]["last_line"]) == ("exit", 3, "to the log")


def test_a_killed_child_reports_the_signal(tmp_path: Path) -> None:
    child, events = start(SLEEP, tmp_path / "log")
    child.signal(signal.SIGKILL)
    assert child.wait(20)
    assert events.get(timeout=20)["code"] == -signal.SIGKILL


def test_a_program_that_cannot_be_started_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Child([str(tmp_path / "missing")], dict(os.environ), tmp_path / "log", queue.Queue())


def test_output_of_a_second_attempt_is_added_to_the_log(tmp_path: Path) -> None:
    for _ in range(2):
        _, events = start("print('once more')", tmp_path / "log")
        assert events.get(timeout=20)["event"] == "exit"
    assert (tmp_path / "log").read_text() == "once more\nonce more\n"


def test_a_training_process_dies_with_its_runner(tmp_path: Path) -> None:
    """The child asks the kernel for it before anything else; here its parent is killed the hard way."""
    program = "from launcher.training.child import die_with_parent; die_with_parent(); import time; print('up', flush=True); time.sleep(60)"
    runner = (
        "import os, queue, sys, time; from pathlib import Path; from launcher.gang.child import Child;"
        f"child = Child([sys.executable, '-c', {program!r}], dict(os.environ), Path({str(tmp_path / 'log')!r}), queue.Queue());"
        "print(child._process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", runner], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    deadline = time.monotonic() + 20
    while "up" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)  # another process's file: nothing to wait on
    parent.kill()
    parent.wait(20)
    parent.stdout.close()
    try:
        psutil.Process(pid).wait(20)
    except psutil.NoSuchProcess:
        return
    assert not psutil.pid_exists(pid)


def test_a_failed_child_that_blames_the_machine_says_so(tmp_path: Path) -> None:
    _, events = start("print('RuntimeError: TPU initialization failed: no chip'); print('bye'); raise SystemExit(1)", tmp_path / "log")
    found = events.get(timeout=20)
    assert (found["sick"], found["last_line"]) == ("RuntimeError: TPU initialization failed: no chip", "bye")
    _, events = start("print('TPU initialization failed, on the CPU now')", tmp_path / "other")
    assert events.get(timeout=20)["sick"] == "", "a program that ended well is not asked"


def test_a_notice_reaches_the_supervisor_and_the_child_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_notice(tmp_path, Notice(NoticeKind.PREEMPTED, 1.0, 31.0))
    monkeypatch.delenv("PODLAUNCH_HOST_DIR", raising=False)
    runner = Runner(str(tmp_path), 0)
    notice = Notice(NoticeKind.PREEMPTED, 1.0, 31.0)
    runner.pass_on(notice)
    assert runner.next_events(0.0) == [], "nobody is there to be told"
    runner._child = Child([sys.executable, "-c", SLEEP], dict(os.environ), tmp_path / "log", runner._events)
    for _ in range(3):
        runner.pass_on(notice)
    assert runner._child.wait(20)
    found = [*runner.next_events(20.0), *runner.next_events(0.0)]
    assert found[0] == {"event": "notice", "kind": "preempted", "time": 1.0, "deadline": 31.0}
    assert [(event["event"], event.get("code")) for event in found[1:]] == [("exit", -signal.SIGTERM)]


def test_the_agents_file_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PODLAUNCH_HOST_DIR", str(tmp_path))
    runner = Runner(str(tmp_path), 0)
    runner._child = Child([sys.executable, "-c", SLEEP], dict(os.environ), tmp_path / "log", runner._events)
    write_notice(tmp_path, Notice(NoticeKind.MAINTENANCE, 1.0, 31.0))
    assert runner.next_events(20.0)[0]["kind"] == "maintenance"
    assert runner._child.wait(20)


def test_a_child_that_nobody_supervises_any_more_is_ended(tmp_path: Path) -> None:
    lease = 1.0
    runner = Runner(str(tmp_path), 0, lease)
    runner._child = Child([sys.executable, "-c", SLEEP], dict(os.environ), tmp_path / "log", runner._events)
    watch = threading.Thread(target=runner._watch_supervisor, args=(runner._child,))
    watch.start()
    assert runner.next_events(3 * lease) == [], "it lives while somebody waits for what it says"
    for _ in range(20):
        runner.renew()
        time.sleep(lease / 10)
    assert watch.is_alive(), "and while its supervisor says that it lives"
    event = runner._events.get(timeout=20)
    assert (event["event"], event["code"]) == ("exit", -signal.SIGKILL)
    watch.join(20)


def test_a_log_is_repeated_to_its_end_and_a_place_that_takes_nothing_stops_that(tmp_path: Path) -> None:
    log = tmp_path / "log"
    said = iter([b"", b"before\nfirst \xc3", b"\xa4\n", b"last\n"])

    def wait(_: float) -> bool:
        """A process that writes while it lives, and once more as it ends."""
        if text := next(said):
            with log.open("ab") as writing:
                writing.write(text)
        return text == b"last\n"

    output = io.StringIO()
    echo(wait, log, len("before\n"), output)
    assert output.getvalue() == "first ä\nlast\n"
    full = Path("/dev/full").open("w")  # noqa: SIM115  # it cannot even be closed
    echo(lambda _: False, log, 0, full)
    with pytest.raises(OSError, match="No space left"):
        full.close()
