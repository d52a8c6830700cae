"""The way into hosts: command lines, what comes back from several hosts at once, and which slice a name means."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from cluster import remote
from cluster.config import ClusterConfig
from cluster.emulator.embedded import Embedded, embedded_emulator
from cluster.errors import ClusterError, ConfigError
from cluster.fan_out import run_all
from cluster.remote import HostProgram, gcloud_command, supervised
from cluster.tpu.slices import ClusterSlice
from launcher.cli.main import app
from tests.stub_gcloud import failing_gcloud

ZONE = "us-central2-b"
CONFIG = ClusterConfig(name="mine", project="my-project", zones=[ZONE], accelerator_type="v4-16")
ITEM = ClusterSlice("mine-0", ZONE, None, None)
SSH = ["compute", "tpus", "tpu-vm", "ssh", "mine-0", "--project=my-project", f"--zone={ZONE}"]
# Takes what the real one takes (see `gcloud compute tpus tpu-vm ssh --help`), and runs the command here.
GCLOUD = f"""#!{sys.executable}
import os, sys
words = sys.argv[1:]
if words[:2] == ["auth", "print-access-token"]:
    sys.exit(print("a-token"))
assert words[:4] == ["compute", "tpus", "tpu-vm", "ssh"], words
assert {{"--project=my-project", "--zone={ZONE}"}} <= set(words), words
options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
env = {{**os.environ, "NODE": words[4], "WORKER": options["--worker"]}}
os.execvpe("bash", ["bash", *(["-c", options["--command"]] if "--command" in options else [])], env)
"""


def shell(script: str) -> HostProgram:
    return HostProgram(["bash", "-c", script], os.environ)


class Told(list[tuple[int, bool, bytes]]):
    def write(self, host: int, is_error: bool, line: bytes) -> None:
        self.append((host, is_error, line))


def test_gcloud_is_asked_for_a_shell_or_a_command_on_one_host() -> None:
    assert gcloud_command(CONFIG, ITEM, 2, None) == ["gcloud", *SSH, "--worker=2"]
    assert gcloud_command(CONFIG, ITEM, 0, "true") == ["gcloud", *SSH, "--worker=0", "--quiet", "--command=true"]


def test_hosts_without_an_address_are_reached_through_iap_or_inside_the_vpc() -> None:
    closed = {**CONFIG.to_dict(), "external_ips": False}
    tunnel, direct = (ClusterConfig.from_dict({**closed, "head_access": access}) for access in ("tunnel", "direct"))
    assert gcloud_command(tunnel, ITEM, 1, None) == ["gcloud", "alpha", *SSH, "--worker=1", "--tunnel-through-iap"]
    assert gcloud_command(direct, ITEM, 1, None) == ["gcloud", *SSH, "--worker=1", "--internal-ip"]


def test_without_gcloud_or_a_login_there_is_one_line_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"there is no gcloud on this machine.*; install the Google Cloud CLI") as missing:
        remote.programs(CONFIG, ITEM, [0, 1], "true", env={"PATH": str(tmp_path)})
    words = "ERROR: (gcloud.auth.print-access-token) You do not currently have an active account selected.\nPlease run:\n"
    with pytest.raises(ClusterError, match=r"gcloud is not logged in \(ERROR: .* selected\.\); run: gcloud auth login") as nobody:
        remote.programs(CONFIG, ITEM, [0, 1], "true", env=failing_gcloud(tmp_path / "bin", words))
    assert not any("\n" in str(error.value) for error in (missing, nobody))


@pytest.mark.parametrize("word", ["a  b", "$HOME", "'", '"', "; exit 9", "*", "", "a\nb", "\\", "{x}", "&"])
def test_words_reach_the_host_as_they_are(word: str) -> None:
    told = Told()
    run_all({0: HostProgram(["bash", "-c", supervised(["printf", "%s|", word, "end"])], os.environ)}, told.write)
    assert b"".join(line for _, is_error, line in told if not is_error).decode() == f"{word}|end|\n"
    assert not any(is_error for _, is_error, _ in told)


@pytest.mark.parametrize(("script", "code"), [("exit 3", 3), ("kill -9 $$", 137), ("exit 255", 254), ("cat", 0)])
def test_exit_code_is_the_commands_own_but_for_that_of_a_lost_connection(script: str, code: int) -> None:
    told = Told()
    assert run_all({0: HostProgram(["bash", "-c", supervised(["sh", "-c", script])], os.environ)}, told.write) == {0: code}
    assert told == []


def test_lines_of_hosts_come_as_they_are_written_and_whole(tmp_path: Path) -> None:
    """Each host writes half a line, waits for the other's half, and then writes the rest: the halves must not mix."""
    halves = [tmp_path / "0", tmp_path / "1"]
    for half in halves:
        os.mkfifo(half)
    first = shell(f"printf one-; echo > {halves[0]}; read < {halves[1]}; echo rest; echo bad >&2; printf end; exit 4")
    second = shell(f"read < {halves[0]}; printf two-; echo > {halves[1]}; echo rest; exit 2")
    told = Told()
    assert run_all({0: first, 1: second}, told.write) == {0: 4, 1: 2}
    assert sorted(told) == [(0, False, b"end\n"), (0, False, b"one-rest\n"), (0, True, b"bad\n"), (1, False, b"two-rest\n")]
    assert [line for host, is_error, line in told if (host, is_error) == (0, False)] == [b"one-rest\n", b"end\n"]


def test_hosts_run_at_the_same_time(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opens for neither before both are there
    both = {0: shell(f"echo met > {tmp_path}/pipe"), 1: shell(f"cat < {tmp_path}/pipe")}
    told = Told()
    assert run_all(both, told.write) == {0: 0, 1: 0}
    assert told == [(1, False, b"met\n")]


def test_program_that_a_signal_ends_counts_as_in_a_shell() -> None:
    assert run_all({0: shell("kill -TERM $$")}, Told().write) == {0: 143}


@pytest.mark.parametrize("deaf", [False, True])
def test_interrupt_ends_every_host(tmp_path: Path, deaf: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`deaf`: a program that does not end with its input, as gcloud while it connects."""
    up = threading.Semaphore(0)

    def interrupted_wait(self: "subprocess.Popen[bytes]", timeout: float | None = None) -> int:
        if timeout is None and not started:
            started.append(self.pid)
            assert up.acquire(timeout=20)
            assert up.acquire(timeout=20)
            raise KeyboardInterrupt
        return wait(self, timeout)

    started: list[int] = []
    wait = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", interrupted_wait)
    script = f"echo $$ >> {tmp_path}/pids; echo up; exec sleep 600"
    program = shell(script) if deaf else HostProgram(["bash", "-c", supervised(["sh", "-c", script])], os.environ)
    with pytest.raises(KeyboardInterrupt):
        run_all({0: program, 1: program}, lambda *line: up.release(), patience=0.2 if deaf else 20.0)
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_when_nobody_reads_any_more_the_command_is_ended() -> None:
    def write(host: int, is_error: bool, line: bytes) -> None:
        raise BrokenPipeError

    assert run_all({0: HostProgram(["bash", "-c", supervised(["yes"])], os.environ)}, write) == {0: 143}


@pytest.fixture
def slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Embedded]:
    """`one` has a slice, `two` has two, of two hosts each, and gcloud reaches them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "gcloud").write_text(GCLOUD)
    (folder / "gcloud").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    with embedded_emulator() as running:
        for name, count in (("one", 1), ("two", 2)):
            settings = {"name": name, "project": "my-project", "zones": [ZONE], "accelerator_type": "v4-16", "slices": count}
            at = {"endpoint": running.endpoint, "secrets_endpoint": running.endpoint, "compute_endpoint": running.rest}
            (tmp_path / "tpu.yaml").write_text(yaml.safe_dump({**settings, **at}))
            assert tpu("start", "--bare", "-y", "--config", str(tmp_path / "tpu.yaml")).exit_code == 0
        yield running


def tpu(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_exec_runs_on_every_host_and_ends_with_the_highest_code(slices: Embedded) -> None:
    done = tpu("exec", "two-1", "--", "sh", "-c", 'echo "$NODE $WORKER"; exit $((WORKER * 5))')
    assert (done.exit_code, sorted(done.stdout.splitlines())) == (5, ["host 0: two-1 0", "host 1: two-1 1"])
    assert tpu("exec", "one", "--host", "1", "--", "printenv", "NODE", "WORKER").stdout == "host 1: one-0\nhost 1: 1\n"
    wrong = tpu("exec", "one", "--host", "0", "--", "sh", "-c", "echo no >&2")
    assert (wrong.exit_code, wrong.stdout, wrong.stderr) == (0, "", "host 0: no\n")


def test_names_that_mean_no_slice_or_several_are_refused(slices: Embedded) -> None:
    for words, told in (
        (("exec", "two", "--", "true"), "^'two' has 2 slices, name one: two-0, two-1$"),
        (("ssh", "three"), "^there is no slice or cluster 'three'; up: one, two; see `tpu status`$"),
    ):
        with pytest.raises(ClusterError, match=told):
            tpu(*words)
    for verb in ("ssh", "exec"):
        with pytest.raises(ConfigError, match=r"^--host 2: slice 'one-0' has 2 hosts, 0 to 1$"):
            tpu(verb, "one", "--host", "2", *(["true"] if verb == "exec" else []))
    slices.cloud.set_node_state("two-0", "REPAIRING")
    with pytest.raises(ClusterError, match=f"^slice 'two-0' in {ZONE} is REPAIRING; only a READY one"):
        tpu("ssh", "two-0")


def test_without_gcloud_the_command_is_one_line(slices: Embedded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("gcloud") is None
    with pytest.raises(ClusterError, match="there is no gcloud"):
        tpu("ssh", "one")
