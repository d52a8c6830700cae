"""The main job, as a user runs it: real Ray, real slices of the emulated cloud, real multi-process JAX."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.runs import RunState
from tests.integration.conftest import SECRET, Home, eventually, launch_command, read_lines, training_process

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def first(home: Home) -> str:
    """The README's first command; what it printed."""
    result = home.launch("model=gemma", "run.name=first")
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_first_command_trains_and_says_what_it_did(home: Home, first: str) -> None:
    status = home.status("first")
    assert status.state is RunState.SUCCEEDED
    assert (status.hosts, status.recoveries.total, status.step) == (2, 0, status.total_steps)
    assert status.step >= 50
    assert status.held_out_before is not None
    assert status.held_out_after is not None
    assert status.held_out_after < status.held_out_before - 1
    metrics = [row for row in home.run("first").metrics() if "loss" in row]
    assert metrics[0]["step"] == 1
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 1, "a nat a byte"
    for text in ("2 hosts, 8 chips", "gemma3-270m", "held-out loss before training", "held-out loss after training", "SUCCEEDED"):
        assert text in first
    assert str(home.run("first").path) in first
    # Every second is accounted for.
    assert status.ended_at is not None
    assert sum(status.phases.values()) == pytest.approx(status.ended_at - status.started_at, rel=0.01)
    assert status.goodput == pytest.approx(status.phases["training"] / sum(status.phases.values()), rel=0.01)


def test_the_run_directory_is_as_the_contract_says(home: Home, first: str) -> None:
    directory = home.run("first")
    for name in ("config.yaml", "code.zip", "status.json", "events.jsonl", "metrics.jsonl", "logs/0/host-0.log", "logs/0/host-1.log"):
        assert (directory.path / name).is_file(), name
    steps = sorted(int(path.name) for path in directory.path.joinpath("checkpoints").iterdir() if path.name.isdigit())
    assert steps
    assert steps[-1] == home.status("first").step
    assert all((directory.path / "checkpoints" / str(step) / "manifest.json").is_file() for step in steps)
    assert (directory.path / "export" / "model.safetensors").is_file()
    assert list((directory.path / "tensorboard").glob("events.out.tfevents*"))
    assert [event["event"] for event in directory.events()][-1] == "state"


def test_secrets_are_nowhere_on_the_disk_once_the_run_has_ended(home: Home, first: str) -> None:
    files = [path for base in (home.folder, home.state) for path in base.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_the_command_of_the_mission_uses_the_running_cluster_and_lowers_the_held_out_loss(home: Home, first: str) -> None:
    before = {path.name for path in (home.folder / "runs").iterdir()}
    started = time.time()
    result = home.launch("model=gemma", "trainer.lr=1e-5")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "starting the head" not in result.stdout
    (name,) = {path.name for path in (home.folder / "runs").iterdir()} - before
    status = home.status(name)
    assert status.held_out_before is not None
    assert status.held_out_after is not None
    assert status.held_out_after < status.held_out_before
    (step,) = [event for event in home.run(name).events() if event["event"] == "first_step"]
    print(f"\nfirst step {step['time'] - started:.1f} s after the command")


@pytest.mark.long
def test_a_run_survives_the_kill_of_a_training_process(home: Home, first: str) -> None:
    process = home.start(*launch_command("run.name=killed", "trainer.checkpoint_every=10", "trainer.steps=40", "trainer.log_every=1"))
    run = home.run("killed")
    eventually(lambda: (status := run.status()) is not None and (status.checkpoint or 0) >= 10, "a checkpoint")
    eventually(lambda: home.status("killed").step >= 13, "steps that no checkpoint holds")
    training_process(home.run("killed"), 1).send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    status = home.status("killed")
    assert (status.state, status.attempt) == (RunState.SUCCEEDED, 1)
    assert (status.recoveries.infrastructure, status.recoveries.total) == (1, 1)
    assert status.first_failure is not None
    assert "SIGKILL" in status.first_failure.error
    rows = [row for row in read_lines(run.path / "metrics.jsonl") if "loss" in row]
    assert sorted({row["step"] for row in rows}) == list(range(1, 41)), "no gap"
    again = [row for row in rows if row["attempt"] == 1]
    assert again[0]["step"] % 10 == 1, "it goes on behind a checkpoint"
    assert again[0]["step"] > 1
    twice = {row["step"]: row["loss"] for row in rows if row["attempt"] == 0}
    for row in again:
        if row["step"] in twice:
            assert row["loss"] == twice[row["step"]], "the same batches, the same losses"
    assert "starting attempt 1" in output
    assert status.phases["training again"] > 0, "steps that no checkpoint held"
    assert status.ended_at is not None
    assert sum(status.phases.values()) == pytest.approx(status.ended_at - status.started_at, rel=0.01)
    # The undisturbed run of the same settings would have come out the same.
    assert (run.path / "logs" / "1" / "host-1.log").is_file()


def test_ctrl_c_detaches_and_the_run_is_stopped_and_resumed_by_name(home: Home, first: str) -> None:
    settings = ("run.name=mine", "trainer.steps=400", "trainer.checkpoint_every=1000")
    process = home.start(*launch_command(*settings))
    run = home.run("mine")
    eventually(lambda: (status := run.status()) is not None and status.step >= 5, "step 5")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "tpu train attach" in output
    assert "tpu train stop" in output
    assert home.status("mine").state is RunState.RUNNING

    refused = home.launch("run.name=mine")
    assert refused.returncode == 2
    assert "is RUNNING already" in refused.stderr

    stopped = home.tpu("train", "stop", "mine")
    assert stopped.returncode == 0, stopped.stderr
    attached = home.tpu("train", "attach", "mine")
    assert attached.returncode == 100
    assert "STOPPED" in attached.stdout
    at = home.status("mine").step
    assert home.status("mine").checkpoint == at, "a stop checkpoints first"

    resumed = home.launch("run.name=mine", "run.resume=true", f"trainer.steps={at + 5}")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"restored from the checkpoint of step {at}" in resumed.stdout
    status = home.status("mine")
    assert status.step == at + 5
    assert status.phases["idle"] > 0
    assert status.ended_at is not None
    assert sum(status.phases.values()) == pytest.approx(status.ended_at - status.started_at, rel=0.01), "over both supervisors"

    for overrides, expected in (
        (("run.name=mine",), "exists (SUCCEEDED"),
        (("run.name=mine", "run.resume=true", "model.variant=gemma3-270m"), "model.variant from gemma3-nano to gemma3-270m"),
        (("run.name=mine", "run.resume=true", f"trainer.steps={at + 5}"), "finished at step"),
    ):
        refused = home.launch(*overrides)
        assert refused.returncode == 2, refused.stdout
        assert expected in refused.stderr


def test_an_error_in_training_fails_the_run_with_exit_code_100(home: Home, first: str) -> None:
    data = home.folder / "vanishing.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}?", "response": f"{i}!"}) + "\n" for i in range(200)))
    config = home.folder / "vanishing.yaml"
    config.write_text(f"data: {{source: jsonl, path: {data}}}\ntrainer: {{steps: 3}}\n")
    submitted = home.tpu("train", "run", str(config), "--output-dir", str(home.run("vanishing").path), "--detach")
    assert submitted.returncode == 0, submitted.stderr
    data.unlink()  # after it was checked, before the training processes read it
    attached = home.tpu("train", "attach", "vanishing")
    assert attached.returncode == 100, attached.stdout
    status = home.status("vanishing")
    assert status.state is RunState.FAILED
    assert status.first_failure is not None
    assert "vanishing.jsonl" in status.first_failure.error
    assert "vanishing.jsonl" in attached.stdout


def test_jsonl_of_the_users_own_trains(home: Home, first: str) -> None:
    data = home.folder / "pairs.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"What is {i} + 1?", "response": str(i + 1)}) + "\n" for i in range(500)))
    result = home.launch("data=jsonl", f"data.path={data}", "run.name=pairs", "trainer=debug")
    assert result.returncode == 0, result.stdout + result.stderr
    loss = home.status("pairs").loss
    assert loss is not None
    assert math.isfinite(loss)


def test_status_and_logs_tell_of_the_runs(home: Home, first: str) -> None:
    table = json.loads(home.tpu("train", "status", "--json").stdout)
    assert "first" in {row["run_id"] for row in table}
    one = json.loads(home.tpu("train", "status", "first", "--json").stdout)
    assert one["state"] == "SUCCEEDED"
    logs = home.tpu("train", "logs", "first", "--host", "1", "--tail", "3")
    assert logs.returncode == 0
    assert all(line.startswith("host-1") for line in logs.stdout.splitlines())
    cluster = json.loads(home.tpu("status", "--json").stdout)
    assert [(row["name"], row["head"], [(s["hosts_ready"], s["state"]) for s in row["slices"]]) for row in cluster] == [
        ("local", "UP", [(2, "READY")])
    ]


def test_two_hundred_runs_are_listed_within_a_second(home: Home, first: str, tmp_path: Path) -> None:
    """Of processor time, by the kernel's account, so that a busy machine does not matter."""
    for k in range(200):  # whole run directories; the files themselves are there once
        shutil.copytree(home.run("first").path, tmp_path / "runs" / f"first-{k}", copy_function=os.link)
    command = [str(Path(sys.executable).parent / "tpu"), "train", "status", "--root", str(tmp_path / "runs")]
    seconds = []
    for _ in range(3):
        process = subprocess.Popen(command, env=home.env, stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process.stdout as stdout:
            listed = stdout.read().decode().splitlines()[1:]
        _, code, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(code)
        assert (process.returncode, len(listed)) == (0, 200)
        assert all(" SUCCEEDED " in row for row in listed)
        seconds.append(used.ru_utime + used.ru_stime)
    print(f"\n200 runs listed with {min(seconds):.2f} s of processor time")
    assert min(seconds) < 1.0


def test_a_client_without_the_token_is_refused(home: Home, first: str) -> None:
    import urllib.error
    import urllib.request

    url = json.loads(home.tpu("status", "--json").stdout)[0]["dashboard"]
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{url}/api/jobs/", timeout=10)
    assert caught.value.code in (401, 403)
    caught.value.close()


def broken(home: Home, name: str, text: str) -> Path:
    path = home.folder / name
    path.write_text(text)
    return path


WRONG: dict[str, tuple[list[str], str]] = {
    "typo in a key": (["trainer.lrr=1"], "did you mean 'trainer.lr'?"),
    "typo in a new key": (["+trainer.step=1"], "did you mean 'trainer.steps'?"),
    "typo in a group": (["modle=gemma"], "did you mean 'model'?"),
    "typo in an option": (["model=gema"], "did you mean 'gemma'?"),
    "typo in a value": (["trainer.compute_dtype=bf16"], "did you mean 'bfloat16'?"),
    "wrong type": (["trainer.steps=many"], "expected a whole number"),
    "unknown variant": (["model.variant=gemma3-2b"], "model.variant 'gemma3-2b' is unknown"),
    "missing data file": (["data=text", "data.path=nowhere.txt"], "nowhere.txt"),
    "empty data file": (["data=text", "data.path=empty.txt"], "empty.txt"),
    "broken jsonl line": (["data=jsonl", "data.path=broken.jsonl"], "broken.jsonl, line 2"),
    "impossible batch": (["trainer.batch_size=12"], "not divisible by the 8 data shards"),
    "impossible topology": (["cluster.accelerator_type=null", "cluster.generation=v4", "cluster.topology=3x3"], "nearest"),
    "another kind of slice than the running cluster's": (["cluster.accelerator_type=v4-32", "trainer.batch_size=16"], "tpu stop local"),
    "run directory not writable": (["run.root=/proc/runs"], "cannot write into /proc"),
    "name of a finished run": (["run.name=first"], "exists (SUCCEEDED"),
    "resume of nothing": (["run.name=nothing", "run.resume=true"], "there is no run 'nothing'"),
    "not an override": (["gemma"], "cannot read the override 'gemma'"),
    "run directory that the hosts do not see": (
        ["cluster=v5e", "cluster.project=my-project", "cluster.zones=[us-central1-a]", "run.root=runs"],
        "do not see this machine's files",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_gives_one_line_and_changes_nothing(home: Home, first: str, case: str) -> None:
    broken(home, "empty.txt", "")
    broken(home, "broken.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt": "a", \n')
    runs = {path.name: (path / "status.json").read_text() for path in (home.folder / "runs").iterdir()}
    overrides, expected = WRONG[case]
    result = home.launch(*overrides, limit=60)
    assert result.returncode in (1, 2), result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    assert {path.name: (path / "status.json").read_text() for path in (home.folder / "runs").iterdir()} == runs
