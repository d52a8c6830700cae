"""How a supervisor learns that the cloud took its slice: written by the node provider, read beside it."""

import dataclasses
from pathlib import Path

import pytest

from cluster.state import cluster_dir
from cluster.tpu.lifecycle import Life
from cluster.tpu.losses import Losses, read_losses, read_ready, read_standing
from cluster.tpu.messages import Slice
from cluster.tpu.slices import ClusterSlice
from launcher.gang.losses import WAIT_S, taken_slice
from launcher.gang.supervisor import states_of

NODE = Slice("c-1", "us-central2-b", "READY", "v4-16", "2x2x2", (), {}, 0.0, "HEALTHY", "", spot=True)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path))
    return cluster_dir("c")


def listed(state: str) -> list[ClusterSlice]:
    # As a sweep hands it out: what it deletes is marked as given up.
    return [ClusterSlice("c-1", "us-central2-b", dataclasses.replace(NODE, state=state), None, given_up=state != "READY")]


class Time:
    """`sleep` passes time, and lets the node provider list whatever `listings` holds for that moment."""

    def __init__(self, losses: Losses, listings: dict[float, str]) -> None:
        self.now = 1000.0
        self._losses, self._listings = losses, listings

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now = round(self.now + seconds, 3)
        if self.now in self._listings:
            self._losses.take(listed(self._listings[self.now]), self.now)


def test_a_preempted_slice_is_remembered_also_by_the_next_writer() -> None:
    losses = Losses("c")
    losses.take(listed("PREEMPTED"), 100.0)
    losses.take([], 102.0)
    Losses("c").take([], 104.0)
    assert read_losses("c") == (104.0, {"c-1": "PREEMPTED"})


def test_a_slice_that_is_well_or_deleted_by_us_is_no_loss() -> None:
    losses = Losses("c")
    for state in ("READY", "REPAIRING", "DELETING"):
        losses.take(listed(state), 100.0)
    assert read_losses("c") == (100.0, {})


def test_slices_that_are_ready_are_told_with_their_type() -> None:
    losses = Losses("c")
    assert read_ready("c") == {}, "nobody has listed yet"
    losses.take(listed("CREATING"), 100.0)
    assert read_ready("c") == {}
    losses.take(listed("READY"), 102.0)
    assert read_ready("c") == {"c-1": "v4-16"}
    losses.take(listed("PREEMPTED"), 104.0)
    assert read_ready("c") == {}


def test_a_cluster_that_is_being_stopped_has_nobody_to_be_told(folder: Path) -> None:
    losses = Losses("c")
    folder.rmdir()
    losses.take(listed("PREEMPTED"), 100.0)
    assert not folder.exists()


def test_the_answer_waits_for_a_listing_that_is_younger_than_the_question() -> None:
    losses = Losses("c")
    losses.take(listed("READY"), 999.0)
    time = Time(losses, {1001.5: "PREEMPTED"})
    assert taken_slice("c", ["c-0", "c-1"], clock=time.clock, sleep=time.sleep) == "slice c-1 became PREEMPTED"
    assert time.now == 1001.5


def test_a_listing_that_shows_the_slice_well_is_an_answer_too() -> None:
    losses = Losses("c")
    losses.take(listed("READY"), 999.0)
    time = Time(losses, {1000.5: "READY", 1003.0: "PREEMPTED"})
    assert taken_slice("c", ["c-1"], clock=time.clock, sleep=time.sleep) == ""
    assert time.now == 1000.5


def test_nobody_waits_for_a_provider_that_lists_no_more() -> None:
    assert taken_slice("c", ["c-1"]) == "", "none has ever listed"
    losses = Losses("c")
    losses.take(listed("READY"), 999.0)
    time = Time(losses, {})
    assert taken_slice("c", ["c-1"], clock=time.clock, sleep=time.sleep) == ""
    assert WAIT_S < time.now - 1000 < WAIT_S + 1


def test_every_slice_is_told_with_where_it_is_in_its_life() -> None:
    losses = Losses("c")
    assert read_standing("c") == {}
    for state, life in (("CREATING", Life.PENDING), ("READY", Life.READY), ("PREEMPTED", Life.LOST)):
        losses.take([dataclasses.replace(one, given_up=False) for one in listed(state)], 100.0)
        assert read_standing("c") == {"c-1": ("v4-16", life)}
    assert states_of("c", "v4-16") == [Life.LOST]
    assert states_of("c", "v4-8") == []
