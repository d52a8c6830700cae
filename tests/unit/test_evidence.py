"""From what all hosts say to one cause."""

import signal
from pathlib import Path

import pytest

from cluster.cloud_errors import DeadlineExceededError
from cluster.storage import STORAGE
from launcher.gang.evidence import Cause, HostFailure, classify, first_error, is_echo
from launcher.gang.memory import OomWatch

ECHO = HostFailure("s0/1", 10.0, 1, "XlaRuntimeError: Gloo all-reduce failed: Connection closed by peer")


@pytest.mark.parametrize(
    ("failures", "host", "cause"),
    [
        ([HostFailure("s0/0", 11.0, -signal.SIGKILL, ""), ECHO], "s0/0", Cause.INFRASTRUCTURE),
        ([ECHO, HostFailure("s0/0", 10.5, 1, "ValueError: bad batch")], "s0/0", Cause.APPLICATION),
        ([ECHO], "s0/1", Cause.INFRASTRUCTURE),
        ([HostFailure("s0/0", 10.0, None, "the host's runner is gone")], "s0/0", Cause.INFRASTRUCTURE),
        ([HostFailure("s0/0", 10.0, 1, "XlaRuntimeError: RESOURCE_EXHAUSTED: out of HBM")], "s0/0", Cause.OOM),
        ([HostFailure("s0/1", 10.2, 1, "KeyError: 'a'"), HostFailure("s0/0", 10.1, 1, "KeyError: 'b'")], "s0/0", Cause.APPLICATION),
    ],
)
def test_the_first_cause_wins_over_its_echoes(failures: list[HostFailure], host: str, cause: Cause) -> None:
    first, found = classify(failures)
    assert (first.host, found) == (host, cause)


UNWRITTEN = "checkpoint 20 could not be written to gs://b/r (the last good one is 10)"
AWAY = DeadlineExceededError("Timeout of 120.0s exceeded", service=STORAGE, resource="gs://b/r/claims/1.json")
NOTICE = HostFailure("s0/0", 9.0, None, "the cloud announced: preempted", preempted=True)
SICK = HostFailure("s0/1", 11.0, 1, "RuntimeError", sick="TPU initialization failed")


@pytest.mark.parametrize(
    ("failure", "cause"),
    [
        (HostFailure("h", 0.0, -signal.SIGKILL, "", oom="the kernel's out-of-memory killer"), Cause.OOM),
        (HostFailure("h", 0.0, -signal.SIGKILL, ""), Cause.INFRASTRUCTURE),
        (HostFailure("h", 0.0, -signal.SIGSEGV, ""), Cause.INFRASTRUCTURE),
        (HostFailure("h", 0.0, -signal.SIGABRT, "Check failed"), Cause.INFRASTRUCTURE),
        (HostFailure("h", 0.0, 1, "RESOURCE_EXHAUSTED: Attempting to reserve 12.00G at the bottom of memory"), Cause.OOM),
        (HostFailure("h", 0.0, 1, "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm"), Cause.OOM),
        (HostFailure("h", 0.0, 1, "MemoryError"), Cause.OOM),
        (HostFailure("h", 0.0, None, "the runner is gone: 1 worker(s) killed due to the node running low on memory"), Cause.OOM),
        (HostFailure("h", 0.0, 1, "CheckpointError: RESOURCE_EXHAUSTED: No space left on device"), Cause.APPLICATION),
        (HostFailure("h", 0.0, 1, "RESOURCE_EXHAUSTED: Quota exceeded for quota metric"), Cause.APPLICATION),
        (HostFailure("h", 0.0, 1, "OSError: [Errno 113] No route to host"), Cause.INFRASTRUCTURE),
        (HostFailure("h", 0.0, 1, f"{UNWRITTEN}: Cannot connect to host a:443 ssl:default [Connect call failed]"), Cause.INFRASTRUCTURE),
        (HostFailure("h", 0.0, 1, f"{UNWRITTEN}: {AWAY}"), Cause.INFRASTRUCTURE),
        (HostFailure("h", 0.0, 1, "XlaRuntimeError: DEADLINE_EXCEEDED: Barrier timed out"), Cause.INFRASTRUCTURE),
        (HostFailure("h", 0.0, 1, "x", sick="open(/dev/vfio/0): Device or resource busy"), Cause.INFRASTRUCTURE),
        (HostFailure("h", 0.0, 3, ""), Cause.APPLICATION),
    ],
)
def test_the_cause_of_one_failure(failure: HostFailure, cause: Cause) -> None:
    assert classify([failure]) == (failure, cause)


@pytest.mark.parametrize(
    ("failures", "expected", "cause"),
    [
        # A sick machine's own words come after those of its peers, which were waiting for it.
        ([ECHO, HostFailure("s0/0", 10.1, 1, "RuntimeError: barrier"), SICK], SICK, Cause.INFRASTRUCTURE),
        # Whoever noticed first, a broken connection on a slice that is taken away is no breakage.
        ([ECHO, NOTICE], NOTICE, Cause.PREEMPTED),
        ([HostFailure("s0/0", 8.0, None, "the runner is gone"), NOTICE], NOTICE, Cause.PREEMPTED),
        ([HostFailure("s0/0", 8.0, 1, "ValueError: bad"), NOTICE], HostFailure("s0/0", 8.0, 1, "ValueError: bad"), Cause.APPLICATION),
    ],
)
def test_evidence_of_several_hosts(failures: list[HostFailure], expected: HostFailure, cause: Cause) -> None:
    assert classify(failures) == (expected, cause)
    assert classify(failures[::-1]) == (expected, cause), "in whatever order it comes"


@pytest.mark.parametrize(
    ("code", "echo"), [(1, True), (-signal.SIGABRT, True), (None, True), (-signal.SIGKILL, False), (-signal.SIGTERM, False)]
)
def test_what_a_killed_process_had_said_of_gloo_makes_it_no_echo(code: int | None, echo: bool) -> None:
    assert is_echo(HostFailure("s0/1", 10.0, code, "[Gloo] Connection closed by peer")) is echo


def test_the_kernels_words_are_told() -> None:
    killed = HostFailure("h", 0.0, -signal.SIGKILL, "step 7", oom="the kernel's out-of-memory killer")
    assert killed.describe == "killed by SIGKILL (the kernel's out-of-memory killer; step 7)"


TRACEBACK = """step 1
Traceback (most recent call last):
  File "train.py", line 3, in <module>
    main()
ValueError: bad
{}"""


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (TRACEBACK.format(""), "ValueError: bad"),
        (TRACEBACK.format("Exception ignored in: <finalizer>\nbye\n"), "ValueError: bad"),
        (TRACEBACK.format("") + TRACEBACK.format("").replace("ValueError: bad", "KeyError: 1"), "KeyError: 1"),
        ("one\n\n  two  \n\n", "two"),
        ("", ""),
        ("Traceback (most recent call last):\n  File", "File"),
        ("step 7\n[Gloo] Rank 1 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1\n", "step 7"),
    ],
)
def test_the_first_error_of_an_output(output: str, expected: str) -> None:
    assert first_error(output) == expected


def kernel(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("groups", "counter"),
    [
        ("0::/system.slice/agent.service\n", "sys/fs/cgroup/system.slice/agent.service/memory.events"),
        ("4:cpu,memory:/jobs/7\n0::/\n", "sys/fs/cgroup/memory/jobs/7/memory.oom_control"),
        ("0::/\n", "proc/vmstat"),
    ],
)
def test_a_kill_for_lack_of_memory_is_seen_in_the_processs_own_group(tmp_path: Path, groups: str, counter: str) -> None:
    kernel(tmp_path, {"proc/7/cgroup": groups, "proc/vmstat": "nr_free 1\noom_kill 3\n", counter: "max 0\noom_kill 3\n"})
    watch = OomWatch(7, tmp_path)
    assert watch.evidence() == ""
    kernel(tmp_path, {counter: "max 9\noom_kill 4\n"})
    assert "out-of-memory killer" in watch.evidence()


def test_a_kill_elsewhere_on_the_machine_is_not_charged_to_a_group_that_counts_itself(tmp_path: Path) -> None:
    own = "sys/fs/cgroup/a/memory.events"
    kernel(tmp_path, {"proc/7/cgroup": "0::/a\n", "proc/vmstat": "oom_kill 3\n", own: "oom_kill 0\n"})
    watch = OomWatch(7, tmp_path)
    kernel(tmp_path, {"proc/vmstat": "oom_kill 4\n"})
    assert watch.evidence() == ""


def test_where_nothing_can_be_read_there_is_no_evidence(tmp_path: Path) -> None:
    assert OomWatch(7, tmp_path).evidence() == ""
