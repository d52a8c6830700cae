"""The table of a supervisor's stages: every pair of a stage and a happening."""

import itertools

import pytest

from launcher.gang.states import BEGIN, ENDS, PHASES, SHOWN, TRANSITIONS, Effect, Happening, Stage, Step
from launcher.runs import FINAL, RunState
from launcher.runs import TRANSITIONS as RUN_TRANSITIONS

PAIRS = list(itertools.product(Stage, Happening))
WITH_PROCESSES = {Stage.STARTING, Stage.RUNNING, Stage.LEAVING, Stage.GATHERING, Stage.STOPPING}
VERDICTS = {Happening.AGAIN_HERE, Happening.AGAIN_ELSEWHERE, Happening.OVER}
HOLDS_SLICES = WITH_PROCESSES | {Stage.RESERVING, Stage.JOINING, Stage.JUDGING, Stage.PAUSING}


def test_every_pair_has_a_step_and_nothing_else_has() -> None:
    assert set(TRANSITIONS) == set(PAIRS)


@pytest.mark.parametrize(("stage", "happening"), PAIRS)
def test_what_follows_can_be_carried_out(stage: Stage, happening: Happening) -> None:
    step = TRANSITIONS[stage, happening]
    if step.stage is stage:
        assert step.effects == (), "who stays does nothing twice"
    if stage in ENDS:
        assert step == Step(stage), "an end is an end"
    if step.stage in ENDS and stage not in ENDS:
        assert step.effects[-1] is Effect.RELEASE, "nothing of a finished run bills"
    if (Effect.START in step.effects) != (step.stage is Stage.STARTING and stage is not Stage.STARTING):
        pytest.fail("processes are started when STARTING is entered, and only then")
    if Effect.PLACE in step.effects:
        assert stage is Stage.JOINING, "runners are placed once on the same hosts"
    assert (Effect.JUDGE in step.effects) == (step.stage is Stage.JUDGING and stage is not Stage.JUDGING)
    if happening in VERDICTS and stage is not Stage.JUDGING:
        assert step == Step(stage), "verdicts are given in JUDGING only"
    if Effect.ASK_TO_END in step.effects:
        assert stage in (Stage.STARTING, Stage.RUNNING), "a gang is asked once"
    if Effect.RESERVE in step.effects:
        assert stage not in HOLDS_SLICES, "slices are asked for when none are held"


@pytest.mark.parametrize("stage", sorted(set(Stage) - ENDS, key=str))
def test_a_user_who_wants_an_end_gets_one(stage: Stage) -> None:
    assert TRANSITIONS[stage, Happening.STOP_NOW] == Step(Stage.STOPPED, (Effect.RELEASE,))
    asked = TRANSITIONS[stage, Happening.STOP]
    asks = stage in (Stage.STARTING, Stage.RUNNING, Stage.LEAVING, Stage.STOPPING)
    assert asked.stage is (Stage.STOPPING if asks else Stage.STOPPED)
    assert TRANSITIONS[Stage.STOPPING, Happening.TIME_UP].stage is Stage.STOPPED, "and not for ever later"


@pytest.mark.parametrize("stage", sorted(WITH_PROCESSES - {Stage.STOPPING}, key=str))
def test_a_failure_is_judged_and_never_overlooked(stage: Stage) -> None:
    assert TRANSITIONS[stage, Happening.GONE].stage is Stage.JUDGING
    assert TRANSITIONS[stage, Happening.FAILURE].stage is Stage.GATHERING
    assert TRANSITIONS[Stage.GATHERING, Happening.TIME_UP].stage is Stage.JUDGING


@pytest.mark.parametrize("stage", sorted(WITH_PROCESSES - {Stage.GATHERING}, key=str))
def test_a_gang_that_has_come_to_its_end_has_succeeded_whatever_was_asked_meanwhile(stage: Stage) -> None:
    assert TRANSITIONS[stage, Happening.FINISHED].stage is Stage.SUCCEEDED
    expected = Stage.STOPPED if stage is Stage.STOPPING else Stage.JUDGING
    assert TRANSITIONS[stage, Happening.YIELDED].stage is expected


def test_every_stage_is_reached_and_leads_to_every_end() -> None:
    after = {stage: {TRANSITIONS[stage, happening].stage for happening in Happening} for stage in Stage}
    assert reachable(BEGIN.stage, after) == set(Stage)
    for stage in set(Stage) - ENDS - {Stage.STOPPING, Stage.GATHERING, Stage.JUDGING}:
        assert reachable(stage, after) >= ENDS


def reachable(stage: Stage, after: dict[Stage, set[Stage]]) -> set[Stage]:
    found, todo = {stage}, [stage]
    while todo:
        new = after[todo.pop()] - found
        found |= new
        todo += new
    return found


def test_the_states_that_are_shown_make_transitions_that_a_run_directory_takes() -> None:
    """Walked through the whole table: from any shown state, in any stage, what is shown next is the same or a transition of a run."""
    seen, todo = set(), [(BEGIN.stage, RunState.STARTING)]
    while todo:
        stage, shown = todo.pop()
        for happening in Happening:
            now = TRANSITIONS[stage, happening].stage
            state = SHOWN.get(now, shown)
            assert state is shown or state in RUN_TRANSITIONS[shown] or stage in ENDS, (stage, happening)
            if (now, state) not in seen:
                seen.add((now, state))
                todo.append((now, state))
    assert {state for stage, state in seen if stage in ENDS} == set(FINAL)


def test_stages_in_which_nobody_speaks_have_a_phase_of_their_own() -> None:
    spoken = {Stage.RUNNING, Stage.LEAVING, Stage.JUDGING}
    assert set(PHASES) == set(Stage) - ENDS - spoken
