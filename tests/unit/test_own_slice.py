"""When the head counts as lost, and how a slice deletes itself."""

from typing import Any

import pytest

from cluster.tpu.errors import NotFoundError, TransientError
from cluster.vm.head_watch import FAILURES, Answer, HeadWatch, reach
from cluster.vm.own_slice import RETRY_S, OwnSlice


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Api:
    """Queued resources and nodes of a project, by kind."""

    def __init__(self, *, queued: bool = True, node: bool = False, down: bool = False) -> None:
        self.there = {"queued": queued, "node": node}
        self.down = down
        self.deleted: list[tuple[str, str, str]] = []

    def delete_queued_resource(self, zone: str, name: str) -> str:
        return self._delete("queued", zone, name)

    def delete_node(self, zone: str, name: str) -> str:
        return self._delete("node", zone, name)

    def _delete(self, kind: str, zone: str, name: str) -> str:
        if self.down:
            raise TransientError("the service stumbles", resource=name, zone=zone)
        if not self.there[kind]:
            raise NotFoundError("there is none", resource=name, zone=zone)
        self.deleted.append((kind, zone, name))
        return "operation"


def slice_with(api: Api, clock: Clock, *, owned: bool = True) -> OwnSlice:
    return OwnSlice("mine-0", "us-central2-b", lambda: api, clock, owned=owned)


@pytest.mark.parametrize(("there", "kind"), [({"queued": True}, "queued"), ({"queued": False, "node": True}, "node")])
def test_it_is_deleted_as_it_was_created(there: dict[str, Any], kind: str) -> None:
    api = Api(**there)
    assert slice_with(api, Clock()).delete("the head is lost")
    assert api.deleted == [(kind, "us-central2-b", "mine-0")]


def test_it_is_asked_for_again_but_not_all_the_time() -> None:
    api, clock = Api(), Clock()
    own = slice_with(api, clock)
    for _ in range(60):
        own.delete("the head is lost")
        clock.now += 1
    assert len(api.deleted) == 60 / RETRY_S


def test_a_service_that_stumbles_is_asked_the_next_time() -> None:
    api, clock = Api(down=True), Clock()
    own = slice_with(api, clock)
    assert not own.delete("the head is lost")
    api.down = False
    clock.now += RETRY_S
    assert own.delete("the head is lost")


def test_a_slice_of_the_users_own_is_never_deleted() -> None:
    api = Api()
    assert not slice_with(api, Clock(), owned=False).delete("the head is lost")
    assert api.deleted == []


def test_the_head_is_lost_after_several_tries_and_counts_from_the_last_answer() -> None:
    clock, answers = Clock(), [Answer.THERE, *[Answer.SILENT] * 10]
    watch = HeadWatch(lambda: answers.pop(0), clock, 10.0)
    reachable = [watch.reachable]
    watch.tick()
    assert [*reachable, watch.reachable] == [False, True], "at first nobody has tried"
    for _ in range(FAILURES - 1):
        clock.now += 10
        watch.tick()
    lost_for = [watch.lost_for]
    clock.now += 10
    watch.tick()
    assert [*lost_for, watch.lost_for] == [0, FAILURES * 10], "one try may fail"
    assert not watch.reachable


def test_a_head_that_comes_back_is_there_again() -> None:
    clock, answers = Clock(), [Answer.SILENT] * 5 + [Answer.THERE]
    watch = HeadWatch(lambda: answers.pop(0), clock, 1.0)
    for _ in range(6):
        clock.now += 1
        watch.tick()
    assert watch.reachable
    assert watch.lost_for == 0


def test_the_head_is_tried_once_an_interval() -> None:
    clock = Clock()
    tries: list[float] = []

    def reach() -> Answer:
        tries.append(clock.now)
        return Answer.THERE

    watch = HeadWatch(reach, clock, 10.0)
    for _ in range(30):
        watch.tick()
        clock.now += 1
    assert tries == [100, 110, 120]


def test_an_address_where_nobody_listens_is_not_reachable() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert reach(address) is Answer.THERE
    assert reach(address) is Answer.REFUSED


def test_a_head_where_nobody_listens_has_ended_and_one_that_is_silent_may_be_cut_off() -> None:
    clock, answers = Clock(), [Answer.THERE, Answer.SILENT, Answer.THERE, Answer.REFUSED, Answer.THERE]
    watch = HeadWatch(lambda: answers.pop(0), clock, 1.0)
    began, ended = clock.now, []
    for _ in range(5):
        clock.now += 1
        watch.tick()
        ended.append(watch.ended_since(began))
    assert ended == [False, False, False, True, True]
    assert not watch.ended_since(clock.now), "what was started then has met the new one"
