"""What `tpu start` tells of slices on their way; the head and the cloud are stood in for."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.clusters import Cluster
from cluster.config import ClusterConfig
from cluster.errors import ClusterError
from cluster.state import clusters_dir
from cluster.tpu.lifecycle import Life
from cluster.tpu.refusals import write_refusals
from cluster.tpu.status import SliceStatus, TPUStatus
from launcher.cli.coming import wait_for_slices

COMING = SliceStatus("c-0", "us-central2-b", "CREATING", Life.PENDING, "v4-16", (), "", 1.0, 0.0)
READY = dataclasses.replace(COMING, state="READY", life=Life.READY)


class World:
    """A cluster as it is at each look; `looks` holds the slice and how many of its hosts have joined, or an error."""

    def __init__(self, looks: list[tuple[SliceStatus, int] | ClusterError], *, alive: bool = True) -> None:
        self.looks, self.alive, self.now = looks, alive, 0.0
        self.told: list[str] = []

    @property
    def cluster(self) -> Cluster:
        config = ClusterConfig(name="c", accelerator_type="v4-16")
        return cast(Cluster, SimpleNamespace(name="c", config=config, http=self, provider=lambda: self, alive=lambda: self.alive))

    def nodes(self) -> list[Any]:
        now = self.looks[0]
        if isinstance(now, ClusterError):
            raise now
        return [SimpleNamespace(slice_name="c-0", alive=True)] * now[1] + [SimpleNamespace(slice_name="c-0", alive=False)]

    def get_status(self) -> TPUStatus:
        now = self.looks[0]
        assert not isinstance(now, ClusterError)
        return TPUStatus("c", (now[0],), 1)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if len(self.looks) > 1:
            self.looks.pop(0)

    def wait(self) -> None:
        wait_for_slices(self.cluster, 1, self.told.append, clock=lambda: self.now, sleep=self.sleep)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path))
    (clusters_dir() / "c").mkdir()


def test_every_change_is_told_once_and_the_wait_ends_with_the_last_host() -> None:
    world = World([(COMING, 0), (COMING, 0), (READY, 0), (READY, 1), (READY, 1), (READY, 2)])
    world.wait()
    assert world.told == [
        "c-0: CREATING in us-central2-b, 0 of 2 hosts",
        "c-0: READY in us-central2-b, 0 of 2 hosts",
        "c-0: READY in us-central2-b, 1 of 2 hosts",
        "c-0: READY in us-central2-b, 2 of 2 hosts",
    ]


def test_a_refusal_is_told_once_whenever_the_next_try_is() -> None:
    world = World([(COMING, 0), (COMING, 0), (READY, 2)])
    write_refusals("c", ["stockout in us-central2-b, next try in 40 s"])
    world.wait()
    assert world.told.count("stockout in us-central2-b") == 1


def test_a_head_that_stumbles_is_passed_over_and_one_that_is_gone_is_not() -> None:
    silent = ClusterError("it does not answer")
    world = World([(COMING, 0), silent, silent, (READY, 2)])
    world.wait()
    assert world.told[-1].endswith("2 of 2 hosts")
    with pytest.raises(ClusterError, match="cannot be watched any more: it does not answer; look with `tpu status`"):
        World([silent], alive=False).wait()
    forever = World([silent])
    with pytest.raises(ClusterError, match="cannot be watched"):
        forever.wait()
    assert 60 <= forever.now <= 70
