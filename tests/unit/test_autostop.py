"""When a cluster ends itself: what counts as use, and what does not."""

from collections.abc import Sequence

import pytest

from cluster.errors import ClusterError
from cluster.vm.autostop import IdleWatch, Job, interval, watch


class World:
    """A clock and Ray's list of jobs, both set by the test."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.jobs: list[Job] | None = []

    def clock(self) -> float:
        return self.now

    def list_jobs(self) -> Sequence[Job]:
        if self.jobs is None:
            raise ClusterError("the head does not answer")
        return self.jobs

    def idle(self, limit: float = 60.0) -> IdleWatch:
        return IdleWatch(limit, self.list_jobs, self.clock)


def test_a_cluster_that_nobody_uses_is_due_once_it_is_old_enough() -> None:
    world = World()
    idle = world.idle()
    world.now += 59.9
    assert not idle.due()
    world.now += 0.1
    assert idle.due()


def test_a_run_that_is_pending_or_running_keeps_it() -> None:
    world = World()
    idle = world.idle()
    world.jobs = [Job(going_on=True, ended=None)]
    world.now += 10_000.0
    assert not idle.due()
    world.jobs = []
    world.now += 59.0
    assert not idle.due(), "the time counts from the last use that was seen"
    world.now += 1.0
    assert idle.due()


def test_a_run_that_came_and_went_between_two_looks_counts() -> None:
    world = World()
    idle = world.idle()
    world.now += 80.0
    world.jobs = [Job(going_on=False, ended=1070.0), Job(going_on=False, ended=900.0), Job(going_on=False, ended=None)]
    assert not idle.due()
    world.now = 1129.9
    assert not idle.due()
    world.now = 1130.0
    assert idle.due()


def test_a_head_that_does_not_answer_is_never_taken_for_idle() -> None:
    world = World()
    idle = world.idle()
    world.jobs = None
    world.now += 10_000.0
    assert not idle.due()
    world.jobs = [Job(going_on=True, ended=None)]
    assert not idle.due()


def test_an_end_that_fails_is_tried_again_at_the_next_look() -> None:
    world = World()
    tries: list[float] = []

    def pause() -> bool:
        world.now += 30.0
        return True

    def act() -> bool:
        tries.append(world.now)
        return len(tries) == 2

    watch(world.idle(), pause, act)
    assert tries == [1060.0, 1090.0]


@pytest.mark.parametrize(("limit", "seconds"), [(5.0, 0.5), (60.0, 3.0), (7200.0, 30.0)])
def test_looks_are_often_enough_and_not_too_often(limit: float, seconds: float) -> None:
    assert interval(limit) == seconds
