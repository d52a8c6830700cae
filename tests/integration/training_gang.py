"""Starts training processes the way a supervisor does, without Ray: pipes for events, a coordinator port, forced CPU devices."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import yaml

from tests.compilations import compilations

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = {"name": "test", "cloud": "emulated"}
Event = dict[str, Any]


def write_config(run_dir: Path, accelerator_type: str = "v4-16", /, **trainer: Any) -> Path:
    """A run directory with a small job over the interpreter's library; `trainer` overrides its settings."""
    run_dir.mkdir(parents=True, exist_ok=True)
    settings = {"steps": 8, "batch_size": 8, "seq_len": 32, "log_every": 3, "checkpoint_every": 3, "eval_batches": 2, "warmup_steps": 2}
    config = {
        "cluster": {**CLUSTER, "accelerator_type": accelerator_type},
        "model": {"variant": "gemma3-nano"},
        "data": {"source": "python_stdlib", "max_bytes": 300_000},
        "trainer": settings | trainer,
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return run_dir


def metrics(run_dir: Path) -> list[Event]:
    """Rows of logged steps."""
    return [row for row in _rows(run_dir) if "loss" in row]


def evaluations(run_dir: Path) -> list[Event]:
    """Rows of evaluations."""
    return [row for row in _rows(run_dir) if "held_out_loss" in row]


def _rows(run_dir: Path) -> list[Event]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def gang_environment(cache: Path, processes: int, devices: int) -> dict[str, str]:
    """What every process of a gang gets; each its PODLAUNCH_PROCESS_ID besides. `devices` is their total, split evenly."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
        "PODLAUNCH_CACHE_DIR": str(cache / "data"),
        "PODLAUNCH_COMPILATION_CACHE": str(compilations()),
        "PODLAUNCH_COORDINATOR": f"127.0.0.1:{port}",
        "PODLAUNCH_NUM_PROCESSES": str(processes),
        "PODLAUNCH_PARENT_PID": str(os.getpid()),
        "PYTHONWARNINGS": "error",
    }


class Gang:
    """The processes of one attempt. `devices` is their total, split evenly."""

    def __init__(
        self,
        run_dir: Path,
        cache: Path,
        *,
        processes: int,
        devices: int = 8,
        attempt: int = 0,
        programs: Mapping[int, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        """`programs`: what takes the place of `-m launcher.training.child` in some of the processes."""
        self._programs = programs
        self.events: list[list[Event]] = [[] for _ in range(processes)]
        self._threads: list[threading.Thread] = []
        self._pipes: list[int] = []
        base = gang_environment(cache, processes, devices)
        self.processes = [self._start(run_dir, base, index, attempt) for index in range(processes)]

    def _start(self, run_dir: Path, base: dict[str, str], index: int, attempt: int) -> "subprocess.Popen[bytes]":
        read, write = os.pipe()
        env = {**base, "PODLAUNCH_PROCESS_ID": str(index), "PODLAUNCH_EVENT_FD": str(write)}
        program = self._programs.get(index, ("-m", "launcher.training.child"))
        command = [sys.executable, *program, str(run_dir), "--attempt", str(attempt)]
        with (run_dir / f"child-{attempt}-{index}.log").open("wb") as log:
            process = subprocess.Popen(command, env=env, pass_fds=[write], cwd=ROOT, stdout=log, stderr=log)
        os.close(write)
        thread = threading.Thread(target=self._read, args=(index, read), daemon=True)
        thread.start()
        self._threads.append(thread)
        return process

    def _read(self, index: int, read: int) -> None:
        with os.fdopen(read, encoding="utf-8") as lines:
            for line in lines:
                self.events[index].append(json.loads(line))

    def named(self, name: str, process: int = 0) -> list[Event]:
        return [event for event in self.events[process] if event["event"] == name]

    def wait(self, timeout: float = 150) -> list[int]:
        """Exit codes; every event has been read."""
        deadline = time.monotonic() + timeout
        codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        for thread in self._threads:
            thread.join(10)
        return codes

    def until(self, condition: Callable[[], bool], timeout: float = 150) -> None:
        """Wait for an event; the processes must still be alive when it comes."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.events[0][-3:]
            assert all(process.poll() is None for process in self.processes), self.events
            time.sleep(0.02)

    def until_step(self, step: int) -> None:
        self.until(lambda: any(event["step"] >= step for event in self.named("step")))

    def send(self, process: int, number: signal.Signals) -> None:
        self.processes[process].send_signal(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for thread in self._threads:
            thread.join(10)
