"""A restart takes the processes that waited, with real JAX, on the shared cluster."""

import contextlib
import signal
import time

import psutil
import pytest

from launcher.runs import RunState
from tests.integration.conftest import Home, eventually, launch_command, training_process

pytestmark = [pytest.mark.timeout(400), pytest.mark.long]


def processes_of(home: Home, run: str) -> set[int]:
    """The run's training processes, and those that wait to be one."""
    found = set()
    for process in home.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "launcher.training.child" in process.cmdline() and str(home.run(run).path) in process.cmdline():
                found.add(process.pid)
    return found


def test_a_restart_takes_the_spares(home: Home) -> None:
    run = home.run("spared")
    settings = ("trainer.steps=100000", "trainer.log_every=1", "trainer.checkpoint_every=20")
    process = home.start(*launch_command("run.name=spared", *settings))
    eventually(lambda: any(run.metrics()), "a step")
    training = {training_process(home.run("spared"), host).pid for host in (0, 1)}
    eventually(lambda: len(processes_of(home, "spared") - training) == 2, "a spare on each host")
    eventually(lambda: (home.status("spared").checkpoint or 0) >= 20, "a checkpoint")
    spares = processes_of(home, "spared") - training
    killed = time.time()
    training_process(home.run("spared"), 0).send_signal(signal.SIGKILL)
    eventually(lambda: any(row["attempt"] == 1 for row in run.metrics()), "a step of the second attempt")
    row = next(row for row in run.metrics() if row["attempt"] == 1)
    print(f"\nSIGKILL to the next step: {row['time'] - killed:.1f} s")
    assert {training_process(home.run("spared"), host).pid for host in (0, 1)} == spares, "those that waited train now"
    assert not training & processes_of(home, "spared")
    assert home.tpu("train", "stop", "spared").returncode == 0
    output, _ = process.communicate(timeout=200)
    status = home.status("spared")
    assert (status.state, status.recoveries.infrastructure) == (RunState.STOPPED, 1), output
    assert status.checkpoint == status.step
