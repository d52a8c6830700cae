"""A process of ours that ends at any call of a start: the next one finds what it left, and nothing is lost or there twice."""

import logging
from collections.abc import Callable, Iterator

import pytest

from cluster.config import TPUConfig
from cluster.emulator.profile import Profile
from tests.inprocess import World, world
from tests.unit.scenarios import Crash, End, ended_channel

A, B = "us-central2-b", "us-east5-a"
PROFILE = Profile(create=10.0, delete=10.0, accept=2.0, queue=5.0, suspend=5.0)
POLL_S = 5.0
SHAPES = [(slices, queued) for slices in (1, 3) for queued in (True, False)]
WAYS = [(error, answered) for error in (Crash, KeyboardInterrupt) for answered in (False, True)]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Hundreds of starts log more than anybody reads."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def config(slices: int, queued: bool) -> TPUConfig:
    kind = {"accelerator_type": "v4-16", "queued_resource": queued, "valid_until": "10m"}
    return TPUConfig.from_dict({"name": "mine", "project": "my-project", "zones": [A, B], "slices": slices, **kind})


def calls_of_a_start(wanted: TPUConfig) -> int:
    with world(PROFILE) as emulated:
        channel = emulated.channel()
        emulated.provider(wanted, channel).start(poll=POLL_S)
        return channel.calls.total()


def end_a_start(emulated: World, wanted: TPUConfig, *ends: End) -> None:
    with pytest.raises(ends[-1].error):
        emulated.provider(wanted, ended_channel(emulated, *ends)).start(poll=POLL_S)


def stop_leaves_nothing(emulated: World, wanted: TPUConfig) -> bool:
    emulated.provider(wanted).stop(poll=POLL_S)
    return (emulated.nodes(), emulated.queued()) == ({}, {})


def start_makes_all_of_it(emulated: World, wanted: TPUConfig) -> bool:
    assert emulated.provider(wanted).start(poll=POLL_S).ready
    emulated.clock.advance(60.0)
    names = {(A, f"mine-{index}") for index in range(wanted.slices)}
    queued = dict.fromkeys(names, "ACTIVE") if wanted.queued_resource else {}
    return (emulated.nodes(), emulated.queued()) == (dict.fromkeys(names, "READY"), queued)


@pytest.mark.parametrize(("slices", "queued"), SHAPES)
@pytest.mark.parametrize("follow", [stop_leaves_nothing, start_makes_all_of_it])
def test_end_at_any_call_of_a_start(slices: int, queued: bool, follow: Callable[[World, TPUConfig], bool]) -> None:
    wanted = config(slices, queued)
    calls = calls_of_a_start(wanted)
    assert calls >= 7 + slices
    for call in range(1, calls + 1):
        for error, answered in WAYS:
            with world(PROFILE) as emulated:
                end = End(call, answered, error)
                end_a_start(emulated, wanted, end)
                assert follow(emulated, wanted), f"{end}: nodes {emulated.nodes()}, queued {emulated.queued()}"


@pytest.mark.parametrize(("slices", "queued"), SHAPES)
def test_interrupt_at_any_call_of_a_start_takes_back_what_it_made(slices: int, queued: bool) -> None:
    wanted = config(slices, queued)
    for call in range(1, calls_of_a_start(wanted) + 1):
        for answered in (False, True):
            with world(PROFILE) as emulated:
                end = End(call, answered, KeyboardInterrupt)
                end_a_start(emulated, wanted, end)
                emulated.clock.advance(60.0)
                assert (emulated.nodes(), emulated.queued()) == ({}, {}), end


@pytest.mark.parametrize("queued", [True, False])
def test_second_interrupt_while_the_first_is_being_dealt_with(queued: bool) -> None:
    wanted = config(3, queued)
    for call in range(1, calls_of_a_start(wanted) + 1):
        for later in range(1, 4):
            with world(PROFILE) as emulated:
                ends = End(call, True, KeyboardInterrupt), End(call + later, True, KeyboardInterrupt)
                end_a_start(emulated, wanted, *ends)
                assert stop_leaves_nothing(emulated, wanted), ends


@pytest.mark.parametrize(("slices", "queued"), SHAPES)
def test_end_at_any_call_of_a_stop(slices: int, queued: bool) -> None:
    wanted = config(slices, queued)
    for call in range(1, 3 + slices):
        for error, answered in WAYS:
            with world(PROFILE) as emulated:
                emulated.provider(wanted).start(poll=POLL_S)
                end = End(call, answered, error)
                with pytest.raises(error):
                    emulated.provider(wanted, ended_channel(emulated, end)).stop(poll=POLL_S)
                assert stop_leaves_nothing(emulated, wanted), end
