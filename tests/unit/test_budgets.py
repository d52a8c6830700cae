"""What a failure costs, and whether the run goes on."""

import signal

import pytest

from launcher.config import BudgetConfig
from launcher.gang.budgets import Budgets
from launcher.gang.evidence import Cause, HostFailure

KILLED = HostFailure("s0/0", 0.0, -signal.SIGKILL, "")
LOST = HostFailure("s0/0", 0.0, None, "the host is gone")


def bug(text: str = "ValueError: bad") -> HostFailure:
    return HostFailure("s0/0", 0.0, 1, text)


@pytest.mark.parametrize(
    ("cause", "again", "reason"),
    [
        (Cause.PREEMPTED, True, ""),
        (Cause.INFRASTRUCTURE, True, ""),
        (Cause.OOM, False, "out of memory"),
        (Cause.APPLICATION, False, "application error"),
    ],
)
def test_by_default_only_what_another_attempt_may_cure_gets_one(cause: Cause, again: bool, reason: str) -> None:
    verdict = Budgets(BudgetConfig()).judge(LOST, cause, 3)
    assert (verdict.again, verdict.reason) == (again, reason)


def test_each_cause_has_its_own_budget() -> None:
    budgets = Budgets(BudgetConfig(infrastructure=2, oom=1))
    assert [budgets.judge(LOST, Cause.INFRASTRUCTURE, step).again for step in (1, 2)] == [True, True]
    assert budgets.judge(KILLED, Cause.OOM, 3).again
    assert all(budgets.judge(LOST, Cause.PREEMPTED, 4).again for _ in range(1000))
    assert budgets.judge(LOST, Cause.INFRASTRUCTURE, 5).reason == "run.budget.infrastructure=2 is used up"
    assert budgets.judge(KILLED, Cause.OOM, 6).reason == "run.budget.oom=1 is used up"


def test_the_same_error_at_the_same_step_twice_ends_the_run_whatever_the_budget_says() -> None:
    budgets = Budgets(BudgetConfig(application=None))
    assert budgets.judge(bug(), Cause.APPLICATION, 7).again
    assert budgets.judge(bug(), Cause.APPLICATION, 8).again, "it came further"
    assert budgets.judge(bug("KeyError: 'x'"), Cause.APPLICATION, 8).again, "another one"
    assert budgets.judge(bug(), Cause.APPLICATION, 7).reason == "crash loop: the same error twice at step 7"


def test_addresses_and_numbers_make_no_other_error() -> None:
    budgets = Budgets(BudgetConfig(application=None))
    assert budgets.judge(bug("RuntimeError: <Buffer at 0x7f12ab> in process 1812"), Cause.APPLICATION, None).again
    again = budgets.judge(bug("RuntimeError: <Buffer at 0x7fe001> in process 1977"), Cause.APPLICATION, None)
    assert again.reason == "crash loop: the same error twice before its first step"


def test_a_segmentation_fault_at_the_same_step_is_a_crash_loop_too() -> None:
    budgets, fault = Budgets(BudgetConfig()), HostFailure("s0/0", 0.0, -signal.SIGSEGV, "")
    assert [budgets.judge(fault, Cause.INFRASTRUCTURE, 7).again for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    "failure",
    [
        KILLED,
        LOST,
        HostFailure("s0/0", 0.0, 1, "no chip", sick="TPU initialization failed"),
        HostFailure("s0/0", 0.0, 1, "OSError: [Errno 101] Network is unreachable"),
    ],
)
def test_what_says_nothing_of_the_program_is_no_crash_loop(failure: HostFailure) -> None:
    budgets = Budgets(BudgetConfig(infrastructure=5))
    assert [budgets.judge(failure, Cause.INFRASTRUCTURE, None).again for _ in range(6)] == [True] * 5 + [False]


def test_the_pause_doubles_up_to_its_limit_and_starts_anew_after_progress() -> None:
    budgets = Budgets(BudgetConfig(infrastructure=None, backoff="3s", backoff_limit="20s"))
    delays = [budgets.judge(LOST, Cause.INFRASTRUCTURE, step).delay for step in (10, 10, None, 9, 10, 10, 11, 11)]
    assert delays == [0.0, 3.0, 6.0, 12.0, 20.0, 20.0, 0.0, 3.0]


def test_a_preempted_run_does_not_pause_and_lengthens_no_pause() -> None:
    budgets = Budgets(BudgetConfig())
    assert [budgets.judge(LOST, Cause.PREEMPTED, None).delay for _ in range(5)] == [0.0] * 5
    assert budgets.judge(LOST, Cause.INFRASTRUCTURE, None).delay == 2.0
