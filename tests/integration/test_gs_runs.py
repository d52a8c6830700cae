"""Runs whose directory is on gs://, on a cluster whose head is a VM: nothing of the client's disk is needed once they are submitted."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.storage import Bucket
from launcher.runs import RunDirectory, RunState
from tests.integration.conftest import Home, eventually, launch_command, make_home, training_process

pytestmark = pytest.mark.timeout(500)
ROOT = "gs://my-runs/team/runs"
STEPS = 40
SETTINGS = ("cluster.head=vm", f"run.root={ROOT}", "trainer=debug", "trainer.eval_batches=1", "trainer.log_every=1", "trainer.seq_len=32")
ONE = (*SETTINGS, "run.name=one", "data=jsonl", "data.path=pairs.jsonl", "trainer.checkpoint_every=10")


@pytest.fixture(scope="module")
def user() -> Iterator[Home]:
    yield from make_home()


@pytest.fixture(scope="module")
def bucket(user: Home) -> Bucket:
    """Not there yet."""
    assert user.tpu("emulator", "start").returncode == 0
    return Bucket("my-runs", json.loads(user.tpu("emulator", "status", "--json").stdout)["storage"], "any")


def losses(run: RunDirectory, attempt: int) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in run.metrics() if row["attempt"] == attempt and "loss" in row}


def write_pairs(folder: Path) -> Path:
    data = folder / "pairs.jsonl"
    records = [{"prompt": f"question {k}", "response": f"the answer to question {k} is {k * k}"} for k in range(300)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    return data


def test_a_run_on_gs_recovers_and_is_followed_from_there(user: Home, bucket: Bucket) -> None:
    data = write_pairs(user.folder)
    refused = user.launch(*SETTINGS, "run.name=one")
    assert refused.returncode == 1
    assert "create the bucket" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    bucket.ensure()

    process = user.start(*launch_command(*ONE, f"trainer.steps={STEPS}"))
    run = RunDirectory(f"{ROOT}/one", bucket.endpoint)
    eventually(lambda: (status := run.status()) is not None and (status.checkpoint or 0) >= 10, "a checkpoint")
    data.unlink()
    training_process(run, 1).send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    status = run.status()
    assert status is not None
    assert (status.state, status.attempt, status.recoveries.infrastructure) == (RunState.SUCCEEDED, 1, 1)
    first, second = losses(run, 0), losses(run, 1)
    assert sorted({*first, *second}) == list(range(1, STEPS + 1)), "no gap"
    assert min(second) % 10 == 1
    assert min(second) > 1, "it goes on behind a checkpoint"
    assert all(second[step] == loss for step, loss in first.items() if step in second), "the same batches, the same losses"
    assert not (user.folder / "runs").exists()
    assert {"export/model.safetensors", "export/config.json"} <= set(run.files.list(""))
    assert any(name.startswith("tensorboard/events") for name in run.files.list(""))
    assert run.logs() == {0: [0, 1], 1: [0, 1]}

    listed = user.tpu("train", "status", "--root", ROOT, "--json")
    assert [(row["run_id"], row["state"]) for row in json.loads(listed.stdout)] == [("one", "SUCCEEDED")]
    said = user.tpu("train", "logs", f"{ROOT}/one", "--attempt", "0", "--host", "1")
    assert "host-1  " in said.stdout


@pytest.mark.long
def test_it_is_resumed_and_stopped_from_there(user: Home, bucket: Bucket) -> None:
    """After the one above."""
    run = RunDirectory(f"{ROOT}/one", bucket.endpoint)
    write_pairs(user.folder)
    again = user.start(*launch_command(*ONE, "trainer.steps=100000", "run.resume=true"))
    eventually(lambda: (status := run.status()) is not None and status.attempt == 2 and status.step > STEPS, "steps of the resumed run")
    stopped = user.tpu("train", "stop", "one", "--root", ROOT)
    assert stopped.returncode == 0, stopped.stderr
    output, _ = again.communicate(timeout=200)
    assert again.returncode == 100, output
    assert f"directory   {ROOT}/one" in output
    status = run.status()
    assert status is not None
    assert status.state is RunState.STOPPED
    assert status.checkpoint == status.step > STEPS
    assert min(losses(run, 2)) == STEPS + 1
