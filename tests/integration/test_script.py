"""The user's own training script, as a user runs it: real Ray, two hosts of the emulated cloud, real multi-process JAX."""

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.goodput import Phase
from launcher.runs import RunState
from tests.integration.conftest import ROOT, Home, eventually, launch_command, training_process

pytestmark = pytest.mark.timeout(400)
EXAMPLES = f"run.code={ROOT / 'examples'}"
TRAIN = ("job=script", EXAMPLES, "job.entrypoint=train_nnx.py --steps=100 --log-every=1")


def said(home: Home, run: str, host: int, beginning: str, attempt: int = 0) -> str:
    """The one line of a host's log that begins so; JAX may say something behind it."""
    log = (home.run(run).path / "logs" / str(attempt) / f"host-{host}.log").read_text()
    (line,) = [line for line in log.splitlines() if line.startswith(beginning)]
    return line


PARAMETERS = "parameters and optimizer state: sha256"
TOLD = "told to end: saved step "


@pytest.fixture(scope="module")
def undisturbed(home: Home) -> str:
    result = home.launch(*TRAIN, "run.name=nnx")
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_script_that_knows_nothing_of_us_runs_on_all_hosts(home: Home) -> None:
    result = home.launch("job=script", EXAMPLES, "run.name=plain", "job.entrypoint=plain_jax.py --name='two words'")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [said(home, "plain", host, "hello") for host in (0, 1)] == [
        f"hello two words: process {host} of 2, sum over all devices 8" for host in (0, 1)
    ]
    status = home.status("plain")
    assert (status.state, status.step, status.total_steps, status.loss, status.goodput) == (RunState.SUCCEEDED, 0, 0, None, None)
    assert "training" not in result.stdout, "it has reported nothing"
    table = home.tpu("train", "status")
    assert "plain" in table.stdout


def test_a_script_tells_its_steps_and_metrics(home: Home, undisturbed: str) -> None:
    status = home.status("nnx")
    assert (status.state, status.step, status.total_steps, status.recoveries.total) == (RunState.SUCCEEDED, 100, 100, 0)
    rows = list(home.run("nnx").metrics())
    assert [row["step"] for row in rows] == list(range(1, 101))
    assert rows[-1]["loss"] == status.loss
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    assert status.goodput is not None
    assert 0 < status.goodput < 1
    assert [event["step"] for event in home.run("nnx").events() if event["event"] == "first_step"] == [1]
    assert f"step 100/100  loss {status.loss:.4f}" in undisturbed
    assert said(home, "nnx", 0, PARAMETERS) == said(home, "nnx", 1, PARAMETERS)


LOOK_AGAIN_AND_AGAIN = """
import contextlib, io, json, sys, time
from cluster.errors import PodlaunchError
from launcher.cli.main import app
said = []
while not (said and "SUCCEEDED" in said[-1]):
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.suppress(PodlaunchError):  # before there is such a run
        app(["train", "status", sys.argv[1], "--json"], standalone_mode=False)
    if stdout.getvalue() not in ("", "[]\\n", *said[-1:]):
        said.append(stdout.getvalue())
    time.sleep(0.05)
print(json.dumps(said))
"""
"""What `tpu train status RUN --json` writes on stdout, each time that it is something else."""


def check_looks(process: "subprocess.Popen[str]") -> None:
    """Those at a run with one recovery: JSON and nothing else, of every state in its order and with a phase that belongs to it."""
    looks = [json.loads(text) for text in json.loads(process.communicate(timeout=60)[0])]
    assert len(looks) > 10
    assert [state for state, _ in itertools.groupby(look["state"] for look in looks)] == [
        *("QUEUED", "STARTING", "RUNNING", "RECOVERING", "RUNNING", "SUCCEEDED")
    ]
    phases = {state.value: {look["phase"] for look in looks if look["state"] == state} for state in RunState}
    begins = {Phase.CAPACITY, Phase.BOOTING, Phase.STARTING}
    assert phases["QUEUED"] == {"submitted"}
    assert phases["STARTING"] <= begins
    trains = {Phase.SCRIPT, Phase.TRAINING}
    assert trains & phases["RUNNING"]
    assert phases["RUNNING"] <= trains | {Phase.RECOVERING}, "for the moment in which the other hosts are heard"
    assert phases["RECOVERING"] <= begins | {Phase.RECOVERING}
    assert phases["SUCCEEDED"] == {""}
    assert [look["attempt"] for look in looks] == sorted(look["attempt"] for look in looks)


def test_a_killed_script_comes_to_the_same_end_and_its_status_tells_of_every_state(home: Home, undisturbed: str) -> None:
    watch = home.start(sys.executable, "-P", "-c", LOOK_AGAIN_AND_AGAIN, "nnx-killed")
    process = home.start(*launch_command(*TRAIN, "run.name=nnx-killed"))
    run = home.run("nnx-killed")
    eventually(lambda: (run.path / "checkpoints" / "20").exists() and home.status("nnx-killed").step >= 25, "steps behind a checkpoint")
    training_process(home.run("nnx-killed"), 1).send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    status = home.status("nnx-killed")
    assert (status.attempt, status.recoveries.infrastructure, status.recoveries.total) == (1, 1, 1)
    again = [row for row in run.metrics() if row["attempt"] == 1]
    assert again[0]["step"] > 1, "it goes on from a checkpoint"
    expected = {row["step"]: row["loss"] for row in home.run("nnx").metrics()}
    found = {row["step"]: row["loss"] for row in run.metrics()}  # of a step that was done twice the second
    assert found == expected
    assert all(row["loss"] == expected[row["step"]] for row in run.metrics())
    assert said(home, "nnx-killed", 0, PARAMETERS, attempt=1) == said(home, "nnx", 0, PARAMETERS), "the parameters too, bit by bit"
    check_looks(watch)


@pytest.mark.long
def test_a_script_that_is_stopped_saves_the_same_step_on_all_hosts_and_goes_on_from_it(home: Home, undisturbed: str) -> None:
    run = home.run("nnx-stopped")
    settings = (*TRAIN, "run.name=nnx-stopped")
    process = home.start(*launch_command(*settings))
    eventually(lambda: (status := run.status()) is not None and status.step >= 5, "step 5")
    assert home.tpu("train", "stop", "nnx-stopped").returncode == 0
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 100, output
    assert home.status("nnx-stopped").state is RunState.STOPPED
    assert home.status("nnx-stopped").reason == "stopped on request"
    saved = [int(said(home, "nnx-stopped", host, TOLD).removeprefix(TOLD)) for host in (0, 1)]
    assert saved[0] == saved[1] < 100
    resumed = home.launch(*settings, "run.resume=true")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert [row["step"] for row in run.metrics()] == list(range(1, 101)), "nothing twice, nothing left out"
    assert said(home, "nnx-stopped", 0, PARAMETERS, attempt=1) == said(home, "nnx", 0, PARAMETERS)


RAISES = """
import jax
from launcher.training import script
jax.distributed.initialize()
script.report(1, 10)
if jax.process_index() == 1:
    raise ValueError("no such file on this host: vocabulary")
from jax.experimental import multihost_utils
multihost_utils.sync_global_devices("the others wait here, until they are killed")
"""


def test_a_script_that_raises_on_one_host_fails_the_run_and_names_the_host(home: Home, tmp_path: Path) -> None:
    (tmp_path / "raises.py").write_text(RAISES)
    result = home.launch("job=script", f"run.code={tmp_path}", "run.name=raises", "job.entrypoint=raises.py")
    assert result.returncode == 100, result.stdout + result.stderr
    status = home.status("raises")
    assert (status.state, status.reason, status.attempt) == (RunState.FAILED, "application error", 0)
    assert status.first_failure is not None
    assert status.first_failure.host.endswith("/1")
    assert status.first_failure.error == "ValueError: no such file on this host: vocabulary"
    assert f"host {status.first_failure.host}: ValueError: no such file" in result.stdout
    log = (home.run("raises").path / "logs" / "0" / "host-1.log").read_text()
    assert "raises.py" in log
    assert "runpy" not in log


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["job.entrypoint=nowhere.py"], "there is no nowhere.py in"),
        (["job.entrypoint=train_nnx.py 'x"], "No closing quotation"),
        (["job.entrypoint=train_nnx.py", "model=gemma"], "model means nothing to"),
    ],
)
def test_a_wrong_program_is_refused_in_one_line(home: Home, overrides: list[str], expected: str) -> None:
    result = home.launch("job=script", EXAMPLES, "run.name=refused", *overrides, limit=60)
    assert result.returncode == 2, result.stdout
    (line,) = result.stderr.splitlines()
    assert expected in line
    assert not home.run("refused").exists()
