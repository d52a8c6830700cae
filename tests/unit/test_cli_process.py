"""Commands as processes of their own: how fast they start, what they import, how they end, and that they follow what is written."""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main

from cluster.config import ClusterConfig
from cluster.errors import ConfigError, PodlaunchError
from launcher.cli.main import app
from launcher.cli.verbs import VERBS
from launcher.config import LaunchConfig
from launcher.data.config import DataConfig
from launcher.follow import EXIT_INTERRUPTED, EXIT_JOB_FAILED, EXIT_OK
from launcher.models.config import ModelConfig
from launcher.runs import RunDirectory, RunState, RunStatus

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TPU = str(BIN / "tpu")


@dataclass(frozen=True)
class User:
    folder: Path

    @property
    def env(self) -> dict[str, str]:
        own = {"PODLAUNCH_STATE_DIR": str(self.folder / "state"), "PODLAUNCH_CACHE_DIR": str(self.folder / "cache"), "NO_COLOR": "1"}
        return {**os.environ, **own, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}

    def call(self, *command: str, **more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command,
            cwd=self.folder,
            env={**self.env, **more},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    @contextlib.contextmanager
    def start(self, *command: str) -> Iterator["subprocess.Popen[str]"]:
        """With Ctrl-C as on a terminal, which the jobs of a shell without one ignore."""
        words = ("env", "--default-signal=INT", *command)
        with subprocess.Popen(
            words, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def run(self, name: str, state: RunState = RunState.RUNNING) -> RunDirectory:
        directory = RunDirectory(self.folder / "runs" / name)
        cluster = ClusterConfig(name="c", accelerator_type="v4-16", cloud="emulated")
        directory.create(LaunchConfig(cluster, ModelConfig("gemma3-nano"), DataConfig("python_stdlib")))
        now = time.time()
        directory.write_status(RunStatus(name, "c", state, started_at=now, updated_at=now, step=3, total_steps=10, loss=2.5))
        return directory


@pytest.fixture
def user(tmp_path: Path) -> User:
    return User(tmp_path)


def next_line(process: "subprocess.Popen[str]", limit: float) -> str:
    """Raises AssertionError when it does not come within so many seconds."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], limit)[0], f"no line within {limit:g} s"
    return process.stdout.readline()


def test_logs_that_are_followed_show_a_line_within_two_seconds_and_ctrl_c_leaves_the_run_alone(user: User) -> None:
    run = user.run("mine")
    run.files.append(run.log_name(0, 0), b"there already\n")
    with user.start(TPU, "train", "logs", "mine", "-f") as command:
        assert next_line(command, 60) == "host-0  there already\n"
        for k in range(3):
            written = time.monotonic()
            run.files.append(run.log_name(0, k % 2), f"line {k}\n".encode())
            assert next_line(command, 2) == f"host-{k % 2}  line {k}\n"
            print(f"shown after {time.monotonic() - written:.2f} s")
        command.send_signal(signal.SIGINT)
        assert command.wait(30) == EXIT_INTERRUPTED
    status = run.status()
    assert status is not None
    assert status.state is RunState.RUNNING
    assert run.stop_requested() is None


@pytest.mark.parametrize("verb", [("status",), ("train", "status"), ("train", "status", "mine")])
def test_ctrl_c_is_how_a_watch_ends_and_leaves_the_run_alone(user: User, verb: tuple[str, ...]) -> None:
    run = user.run("mine")
    with user.start(TPU, *verb, "--watch", "--interval", "0.2") as command:
        assert next_line(command, 60)
        command.send_signal(signal.SIGINT)
        said = command.communicate(timeout=30)
        assert (command.returncode, said[1]) == (EXIT_OK, "")
    status = run.status()
    assert status is not None
    assert status.state is RunState.RUNNING
    assert run.stop_requested() is None


ENDS: dict[int, list[tuple[str, ...]]] = {
    EXIT_OK: [("types", "-g", "v6e"), ("train", "attach", "good"), ("train", "status"), ("stop",)],
    PodlaunchError.exit_code: [("train", "status", "nowhere"), ("train", "stop", "good"), ("ssh", "nowhere"), ("stop", "nowhere")],
    ConfigError.exit_code: [
        ("start", "v9"),
        ("start", "--bear"),
        ("statsu",),
        ("train", "run", "nowhere.yaml"),
        ("status", "--json", "--watch"),
    ],
    EXIT_JOB_FAILED: [("train", "attach", "bad"), ("train", "attach", "stopped")],
}


@pytest.mark.parametrize(("code", "words"), [(code, words) for code, all_words in ENDS.items() for words in all_words], ids=str)
def test_a_command_ends_with_the_code_that_the_documents_name(user: User, code: int, words: tuple[str, ...]) -> None:
    for name, state in (("good", RunState.SUCCEEDED), ("bad", RunState.FAILED), ("stopped", RunState.STOPPED)):
        user.run(name, state)
    done = user.call(TPU, *words)
    assert done.returncode == code, done.stdout + done.stderr
    if code in (PodlaunchError.exit_code, ConfigError.exit_code):
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")


def test_all_exit_codes_are_documented_in_one_place() -> None:
    text = (ROOT / "docs" / "commands.md").read_text().partition("## Exit codes")[2].partition("## Ctrl-C")[0]
    documented = [int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]
    kinds: list[type[PodlaunchError]] = [PodlaunchError, *all_errors(PodlaunchError)]
    said = {EXIT_OK, EXIT_JOB_FAILED, EXIT_INTERRUPTED, *(kind.exit_code for kind in kinds)}
    assert set(documented) == {*ENDS, EXIT_INTERRUPTED} == said
    assert len(documented) == len(set(documented))


def all_errors(kind: type[PodlaunchError]) -> Iterator[type[PodlaunchError]]:
    for one in kind.__subclasses__():
        yield one
        yield from all_errors(one)


@pytest.mark.parametrize("words", [(), ("train",), ("emulator",)])
def test_a_group_of_verbs_alone_shows_them(user: User, words: tuple[str, ...]) -> None:
    done = user.call(TPU, *words)
    assert (done.returncode, done.stdout) == (ConfigError.exit_code, "")
    assert done.stderr.startswith(f"Usage: {' '.join(['tpu', *words])} ")


def test_the_help_of_all_verbs_is_that_of_each() -> None:
    group: Any = typer.main.get_command(app)
    for name, (_, said) in VERBS.items():
        assert " ".join(group.commands[name].help.split()).startswith(said), name
        assert group.commands[name].name == name


def test_bash_completes_verbs(user: User) -> None:
    def complete(line: str) -> list[str]:
        words = line.split(" ")
        asked = {"_TPU_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
        return user.call(TPU, **asked).stdout.split()

    assert complete("tpu tr") == ["train"]
    assert complete("tpu train re") == ["report"]
    assert "--slices" in complete("tpu start --")
    script = user.call("bash", "-c", "tpu --show-completion; exit $?")
    assert script.returncode == 0, script.stderr
    assert "_TPU_COMPLETE=complete_bash" in script.stdout
    answered = user.call(
        "bash", "-c", f"{script.stdout}\nCOMP_WORDS=(tpu tr) COMP_CWORD=1; _tpu_completion tpu tr tpu; echo ${{COMPREPLY[@]}}"
    )
    assert answered.stdout.split() == ["train"], answered.stderr


def cpu_seconds(user: User, *command: str) -> float:
    """Of the process and its children, by the kernel's account: a busy machine does not change it much."""
    found = []
    for _ in range(3):
        process = subprocess.Popen(
            command, cwd=user.folder, env=user.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        said = process.stdout.read()
        process.stdout.close()
        _, code, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(code)
        assert process.returncode == 0, said
        found.append(used.ru_utime + used.ru_stime)
    return min(found)


def test_help_takes_half_a_second_at_most(user: User) -> None:
    used = cpu_seconds(user, TPU, "--help")
    print(f"\ntpu --help: {used:.2f} s of processor time")
    assert used < 0.5


@pytest.mark.parametrize("words", [("--help",), ("train", "status"), ("train", "status", "mine"), ("train", "logs", "mine"), ("status",)])
def test_what_looks_on_imports_neither_jax_nor_ray(user: User, words: tuple[str, ...]) -> None:
    run = user.run("mine", RunState.SUCCEEDED)
    run.files.append(run.log_name(0, 0), b"x\n")
    code = "import atexit, json, sys; from launcher.cli.main import main; sys.argv[0] = 'tpu'\n"
    code += "atexit.register(lambda: print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})), file=sys.stderr))\nmain()"
    done = user.call(sys.executable, "-c", code, *words)
    assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stderr.splitlines()[-1]))
    assert imported >= {"launcher", "typer"}
    assert not imported & {"jax", "ray", "numpy", "hydra", "flax", "orbax", "grpc"}
