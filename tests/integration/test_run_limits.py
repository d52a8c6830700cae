"""What ends a run before its last step: its spending cap, and a user who cannot wait."""

import shutil

import pytest

from launcher.runs import RunState
from tests.integration.conftest import Home, eventually, launch_command

pytestmark = pytest.mark.timeout(300)
LONG = ("trainer=debug", "trainer.steps=100000", "trainer.checkpoint_every=100000")


def test_a_run_that_is_stopped_now_does_not_wait_for_a_checkpoint(home: Home) -> None:
    process = home.start(*launch_command("run.name=hasty", *LONG))
    run = home.run("hasty")
    eventually(lambda: (status := run.status()) is not None and status.step >= 3, "step 3")
    stopped = home.tpu("train", "stop", "hasty", "--now")
    assert stopped.returncode == 0, stopped.stderr
    assert "will end" in stopped.stdout
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 100, output
    status = home.status("hasty")
    assert (status.state, status.reason) == (RunState.STOPPED, "stopped at once, as somebody asked")
    assert status.checkpoint is None
    assert not [path for path in (run.path / "checkpoints").glob("*") if path.name.isdigit()]

    shutil.rmtree(run.path)
    again = home.launch("run.name=hasty", "trainer=debug")
    assert again.returncode == 1, again.stdout + again.stderr
    assert again.stderr.splitlines()[-1].endswith("which is deleted or elsewhere: choose another run.name")
    assert not run.path.exists(), "nothing was begun"


@pytest.mark.long
def test_a_run_that_has_spent_its_cap_saves_and_ends_and_goes_on_with_a_higher_one(home: Home) -> None:
    a_dollar_a_second = "cluster.slice_usd_per_hour=3600"
    capped = home.launch("run.name=capped", *LONG, a_dollar_a_second, "run.max_usd=20")
    assert capped.returncode == 100, capped.stdout + capped.stderr
    status = home.status("capped")
    assert (status.state, status.reason) == (RunState.STOPPED, "stopped: run.max_usd=20 is reached (estimate by list price)")
    assert status.cost_usd is not None
    assert status.cost_usd >= 20
    assert status.step > 0
    assert status.checkpoint == status.step, "nothing that was paid for is lost"
    assert "run.max_usd=20 is reached" in capped.stdout

    steps = status.step + 3
    more = home.launch("run.name=capped", *LONG, f"trainer.steps={steps}", a_dollar_a_second, "run.max_usd=900", "run.resume=true")
    assert more.returncode == 0, more.stdout + more.stderr
    assert home.status("capped").step == steps
    assert (home.status("capped").cost_usd or 0) > status.cost_usd, "what it cost before counts"
