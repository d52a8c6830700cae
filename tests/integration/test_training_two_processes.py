"""Two real processes of four devices each: kill, stop, resume, and the same numbers as without any of it."""

import json
import signal
from pathlib import Path

import pytest

from launcher.gang.stragglers import Stragglers
from tests.integration.training_gang import Gang, metrics, write_config

SLOW_STEPS = 40
"""Enough that a signal arrives long before the end."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def undisturbed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_config(tmp_path_factory.mktemp("runs") / "undisturbed", steps=SLOW_STEPS, checkpoint_every=10, log_every=1)
    with Gang(run, cache, processes=2) as gang:
        assert gang.wait() == [0, 0], gang.events
        assert [event["event"] for event in gang.events[0]][-1] == "finished"
        assert [event["when"] for event in gang.named("evaluation")] == ["before", "after"]
        assert gang.named("evaluation")[1]["loss"] < gang.named("evaluation")[0]["loss"] - 1
        assert [event["step"] for event in gang.named("checkpoint")] == [10, 20, 30, 40]
        assert gang.named("checkpoint", process=1) == []
    return run


def final_loss(run: Path) -> float:
    record = metrics(run)[-1]
    assert record["step"] == SLOW_STEPS
    return float(record["loss"])


def curve(run: Path) -> list[tuple[float, ...]]:
    """What the last attempt at each step measured; times left out."""
    last = {record["step"]: record for record in metrics(run)}
    return [tuple(last[step][name] for name in ("step", "loss", "grad_norm", "lr")) for step in sorted(last)]


def weights(run: Path) -> bytes:
    return (run / "export" / "model.safetensors").read_bytes()


@pytest.mark.timeout(400)
def test_two_processes_killed_and_resumed_give_the_undisturbed_result(undisturbed: Path, cache: Path, tmp_path: Path) -> None:
    run = write_config(tmp_path / "killed", steps=SLOW_STEPS, checkpoint_every=10, log_every=1)
    with Gang(run, cache, processes=2) as gang:
        gang.until(lambda: bool(gang.named("checkpoint")) and gang.named("step")[-1]["step"] >= 14)
        gang.send(1, signal.SIGKILL)
    newest = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    with Gang(run, cache, processes=2, attempt=1) as gang:
        assert gang.wait() == [0, 0], gang.events
        assert [event["step"] for event in gang.named("restored")] == [newest]
        assert [event["when"] for event in gang.named("evaluation")] == ["after"]
    assert curve(run) == curve(undisturbed)
    assert weights(run) == weights(undisturbed)
    records = metrics(run)
    assert sorted({record["step"] for record in records}) == [record["step"] for record in metrics(undisturbed)]
    assert {record["attempt"] for record in records} == {0, 1}
    assert all(record["step"] > newest for record in records if record["attempt"] == 1)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_sigterm_to_one_process_stops_both_at_the_same_step_and_one_process_goes_on(undisturbed: Path, cache: Path, tmp_path: Path) -> None:
    run = write_config(tmp_path / "stopped", steps=SLOW_STEPS, checkpoint_every=1000)
    with Gang(run, cache, processes=2) as gang:
        gang.until_step(4)
        gang.send(1, signal.SIGTERM)
        assert gang.wait() == [143, 143], gang.events
        (saved,) = gang.named("checkpoint")
        assert gang.named("step")[-1]["step"] <= saved["step"]
    with Gang(run, cache, processes=1, attempt=1) as gang:
        assert gang.wait() == [0], gang.events
        assert gang.named("restored") == [{"event": "restored", "step": saved["step"], "time": gang.named("restored")[0]["time"]}]
    assert final_loss(run) == pytest.approx(final_loss(undisturbed), abs=2e-3)  # another order of sums


@pytest.mark.long
@pytest.mark.timeout(400)
def test_one_process_of_eight_devices_killed_and_resumed_gives_the_undisturbed_curve_bit_by_bit(
    undisturbed: Path, cache: Path, tmp_path: Path
) -> None:
    """And the curve of two processes of four devices, up to the order of floating-point sums."""
    settings = {"steps": SLOW_STEPS, "log_every": 1}
    alone = write_config(tmp_path / "alone", **settings, checkpoint_every=1000)
    with Gang(alone, cache, processes=1) as gang:
        assert gang.wait() == [0], gang.events
    run = write_config(tmp_path / "killed", **settings, checkpoint_every="1s")
    with Gang(run, cache, processes=1) as gang:
        gang.until(lambda: bool(gang.named("checkpoint")))
        gang.send(0, signal.SIGKILL)
    write_config(run, **settings, checkpoint_every="auto", mesh={"data": 8})
    with Gang(run, cache, processes=1, attempt=1) as gang:
        assert gang.wait() == [0], gang.events
        assert gang.named("restored")[0]["step"] > 0
    assert curve(run) == curve(alone)
    assert weights(run) == weights(alone)
    for ours, theirs in zip(curve(run), curve(undisturbed), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)


@pytest.mark.timeout(200)
def test_sigterm_to_a_single_process_saves_and_exits_143(cache: Path, tmp_path: Path) -> None:
    run = write_config(tmp_path / "single", steps=SLOW_STEPS * 10, checkpoint_every=1000)
    with Gang(run, cache, processes=1) as gang:
        gang.until_step(3)
        gang.send(0, signal.SIGTERM)
        assert gang.wait() == [143], gang.events
        (saved,) = gang.named("checkpoint")
    manifest = json.loads((run / "checkpoints" / str(saved["step"]) / "manifest.json").read_text())
    assert manifest["files"]


@pytest.mark.timeout(200)
def test_a_wrong_mesh_ends_with_exit_code_1_and_one_line(cache: Path, tmp_path: Path) -> None:
    run = write_config(tmp_path / "wrong")
    with Gang(run, cache, processes=1, devices=3) as gang:
        assert gang.wait() == [1]
        (error,) = gang.named("error")
    assert error["error"].startswith("trainer.mesh {data: 8, fsdp: 1, sequence: 1, tensor: 1} does not divide 3 devices")
    assert "Traceback" in (run / "child-0-0.log").read_text()


SLOW_READER = """
import runpy, time
from launcher.data.batches import TrainBatches
rows = TrainBatches.rows
def late(self, step, start, stop):
    time.sleep(0.2)
    return rows(self, step, start, stop)
TrainBatches.rows = late
runpy.run_module("launcher.training.child", run_name="__main__")
"""


@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_host_that_the_others_wait_for_is_named(cache: Path, tmp_path: Path) -> None:
    """The batches of one host come late, as from a slow disk."""
    slow = tmp_path / "slow.py"
    slow.write_text(SLOW_READER)
    run = write_config(tmp_path / "uneven", steps=12, checkpoint_every=1000, log_every=1)
    with Gang(run, cache, processes=2, programs={1: [str(slow)]}) as gang:
        assert gang.wait() == [0, 0], gang.events
    stragglers = Stragglers(["a", "b"])
    heard = sorted(((event["time"], index, event) for index, events in enumerate(gang.events) for event in events), key=lambda one: one[:2])
    found = [told for when, index, event in heard if (told := stragglers.hear(index, event, when)) is not None]
    assert [told.host for told in found] == ["b"], found
    (told,) = found
    assert 0.1 < told.extra_s <= told.step_s
