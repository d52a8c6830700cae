"""Every second of a run in exactly one phase: random histories on a virtual clock."""

from collections import defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.goodput import Account, Phase, goodput

SECONDS = st.floats(0.0, 1e4)
WAITING = [phase for phase in Phase if phase not in (Phase.TRAINING, Phase.AGAIN, Phase.INPUT)]


@dataclass(frozen=True)
class Waiting:
    """The run is in a phase in which no step is done."""

    phase: Phase
    seconds: float


@dataclass(frozen=True)
class Training:
    """An attempt goes on from `back` steps before the highest one, and does one step after the other."""

    back: int
    steps: list[tuple[float, float]]
    """Seconds, and the share of them that was spent waiting for input."""
    dies_after: float
    """Seconds into a step that nobody hears the end of."""


@dataclass(frozen=True)
class Handover:
    """The supervisor is gone for a while; the next one has what the status said."""

    phase: Phase
    seconds: float


@dataclass(frozen=True)
class Price:
    usd_per_second: float


HISTORIES = st.lists(
    st.one_of(
        st.builds(Waiting, st.sampled_from(WAITING), SECONDS),
        st.builds(Training, st.integers(0, 20), st.lists(st.tuples(SECONDS, st.floats(0, 1)), max_size=20), SECONDS),
        st.builds(Handover, st.sampled_from([Phase.RECOVERING, Phase.IDLE]), SECONDS),
        st.builds(Price, st.floats(0, 1)),
    ),
    max_size=30,
)


@dataclass
class Played:
    """A history played on an account, and beside it what each second was, worked out the simple way."""

    account: Account
    now: float = 1000.0
    rate: float = 0.0
    highest: int = 0
    truth: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    dollars: float = 0.0

    def pass_time(self, phase: Phase, seconds: float) -> None:
        self.now += seconds
        self.truth[phase] += seconds
        self.dollars += seconds * self.rate

    def play(self, part: Waiting | Training | Handover | Price) -> None:
        match part:
            case Waiting(phase, seconds):
                self.account.enter(phase, self.now)
                self.pass_time(phase, seconds)
            case Training():
                self.train(part)
            case Handover(phase, seconds):
                self.hand_over(phase, seconds)
            case Price(rate):
                self.account.charge(rate, self.now)
                self.rate = rate

    def train(self, part: Training) -> None:
        step = max(0, self.highest - part.back)
        self.account.enter(Phase.TRAINING, self.now)
        self.account.begin_at(step)
        waited = 0.0
        for seconds, share in part.steps:
            step += 1
            self.pass_time(Phase.INPUT, seconds * share)
            self.pass_time(Phase.TRAINING if step > self.highest else Phase.AGAIN, seconds * (1 - share))
            waited += seconds * share
            self.highest = max(self.highest, step)
            self.account.step(step, waited, self.now)
        self.pass_time(Phase.TRAINING if step >= self.highest else Phase.AGAIN, part.dies_after)
        self.account.enter(Phase.RECOVERING, self.now)

    def hand_over(self, phase: Phase, seconds: float) -> None:
        old, at = self.account, self.now
        self.account = Account(at, phase, seconds=old.seconds(at), dollars=old.dollars(at), highest=old.highest)
        self.rate = 0.0
        self.pass_time(phase, seconds)


def play(history: list[Waiting | Training | Handover | Price]) -> Played:
    played = Played(Account(1000.0, Phase.STARTING))
    for part in history:
        played.play(part)
    return played


@given(HISTORIES)
def test_every_second_is_in_the_phase_it_belongs_to(history: list[Waiting | Training | Handover | Price]) -> None:
    played = play(history)
    found = played.account.seconds(played.now)
    for phase in Phase:
        assert found.get(phase, 0.0) == pytest.approx(played.truth[phase], abs=1e-6, rel=1e-6), phase
    assert sum(found.values()) == pytest.approx(played.now - 1000.0, abs=1e-6, rel=1e-6)
    assert sum(played.account.dollars(played.now).values()) == pytest.approx(played.dollars, abs=1e-6, rel=1e-6)


@given(HISTORIES, st.integers(1, 5), st.randoms(use_true_random=False))
def test_the_sum_is_the_wall_time_whatever_is_heard_of_it(history: list[Waiting | Training | Handover | Price], every: int, random) -> None:  # type: ignore[no-untyped-def]
    """Only some steps are told, late, with clocks of hosts that differ, and waits that claim more than there was."""
    account, now = Account(1000.0, Phase.STARTING), 1000.0
    for part in history:
        match part:
            case Waiting(phase, seconds) | Handover(phase, seconds):
                account.enter(phase, now + random.uniform(-2, 0))
                now += seconds
            case Training(back, steps, dies_after):
                account.enter(Phase.TRAINING, now)
                account.begin_at(max(0, account.highest - back))
                for number, (seconds, _) in enumerate(steps):
                    now += seconds
                    if number % every == 0:
                        account.step(max(0, account.highest - back) + number, random.uniform(0, 1e4), now + random.uniform(-2, 0))
                now += dies_after
            case Price(rate):
                account.charge(rate, now)
    found = account.seconds(now)
    assert all(seconds >= 0 for seconds in found.values())
    assert sum(found.values()) == pytest.approx(now - 1000.0, abs=1e-5, rel=1e-6)


def test_steps_that_are_told_together_are_split_at_the_highest_one() -> None:
    account = Account(0.0, Phase.TRAINING)
    account.begin_at(0)
    account.step(10, 0.0, 10.0)
    account.enter(Phase.RECOVERING, 10.0)
    account.enter(Phase.TRAINING, 15.0)
    account.begin_at(6)
    account.step(14, 0.0, 23.0)  # 7 to 10 again, 11 to 14 new
    assert account.seconds(23.0) == {Phase.TRAINING: 14.0, Phase.RECOVERING: 5.0, Phase.AGAIN: 4.0}
    assert goodput(account.seconds(23.0)) == pytest.approx(14 / 23)


def test_a_run_without_a_second_has_no_goodput() -> None:
    assert goodput(Account(0.0, Phase.STARTING).seconds(0.0)) is None
