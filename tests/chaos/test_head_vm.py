"""The VM of a head is lost while a run trains on its cluster, whose directory is on gs://."""

import json
import time
from collections.abc import Iterator

import pytest

from cluster.compute import Instances
from cluster.storage import Bucket
from launcher.runs import RunDirectory, RunState
from tests.integration.conftest import Home, eventually, launch_command, make_home

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]
ROOT = "gs://my-runs/runs"
HEAD = "podlaunch-local-head"
SETTINGS = ("cluster.head=vm", f"run.root={ROOT}", "run.name=mine", "trainer=debug", "trainer.eval_batches=1", "trainer.seq_len=32")


@pytest.fixture
def own() -> Iterator[Home]:
    yield from make_home()


def test_a_run_on_gs_goes_on_from_its_checkpoint_on_a_new_head_vm_and_new_slices(own: Home) -> None:
    assert own.tpu("emulator", "start").returncode == 0
    emulated = json.loads(own.tpu("emulator", "status", "--json").stdout)
    Bucket("my-runs", emulated["storage"], "any").ensure()
    follower = own.start(*launch_command(*SETTINGS, "trainer.steps=100000", "trainer.checkpoint_every=10", "trainer.log_every=1"))
    run = RunDirectory(f"{ROOT}/mine", emulated["storage"])
    eventually(lambda: (status := run.status()) is not None and (status.checkpoint or 0) >= 10, "a checkpoint")
    before = run.status()
    assert before is not None

    lost = time.time()
    instances = Instances(emulated["rest"], "podlaunch-emulated")
    instances.delete("us-central2-b", HEAD)
    output, _ = follower.communicate(timeout=120)
    assert follower.returncode == 1, output
    assert "tpu start" in output, "it says what to do"
    status = run.status()
    assert status is not None
    assert status.state is RunState.RUNNING, "nobody ends a run because its head is away"

    again = own.tpu("start", "head=vm", "-y")
    assert again.returncode == 0, again.stderr
    eventually(lambda: any(row["attempt"] > before.attempt for row in run.metrics()), "a step of the next attempt")
    rows = [row for row in run.metrics() if row["attempt"] > before.attempt and "loss" in row]
    print(f"\nloss of the head VM to the next step: {rows[0]['time'] - lost:.0f} s, of which tpu start was asked for after the first")
    assert rows[0]["step"] % 10 == 1
    assert rows[0]["step"] > 1
    old = {row["step"]: row["loss"] for row in run.metrics() if row["attempt"] == before.attempt and "loss" in row}
    assert all(old[row["step"]] == row["loss"] for row in rows if row["step"] in old), "the same batches, the same losses"
    after = run.status()
    assert after is not None
    assert not set(before.slices) & set(after.slices)
    instances.close()
    assert own.tpu("train", "stop", "mine", "--root", ROOT).returncode == 0
    eventually(lambda: (status := run.status()) is not None and status.state is RunState.STOPPED, "its end")
