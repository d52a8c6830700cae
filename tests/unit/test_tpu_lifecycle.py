"""What the states of the API mean: every pair of them."""

import itertools

import pytest
from google.cloud import tpu_v2

from cluster.tpu.lifecycle import LIFE_OF_STATE, QUEUE_OF_STATE, TRANSITIONS, Action, Life, step

NODES = [None, *tpu_v2.Node.State.__members__]
QUEUES = [None, *tpu_v2.QueuedResourceState.State.__members__]
DEAD = ("FAILED", "SUSPENDED", "SUSPENDING")


def test_every_pair_of_states_of_the_api_has_a_meaning() -> None:
    assert set(tpu_v2.Node.State.__members__) == set(LIFE_OF_STATE)
    assert set(tpu_v2.QueuedResourceState.State.__members__) == set(QUEUE_OF_STATE)
    assert set(TRANSITIONS) == set(itertools.product(NODES, QUEUES))


@pytest.mark.parametrize(("node", "queue"), list(TRANSITIONS))
def test_what_is_left_over_is_deleted_and_what_is_nowhere_is_made(node: str | None, queue: str | None) -> None:
    now = step(node, queue)
    assert (now.wanted is Action.CREATE) == (node is None and queue is None), "a slice is made only where nothing is"
    assert (now.unwanted is Action.NOTHING) == (node is None and queue is None), "what is there and unwanted is deleted or going"
    if queue in DEAD or (node in ("PREEMPTED", "TERMINATED", "STOPPED", "STOPPING") and queue != "DELETING"):
        assert now.wanted is Action.REPLACE, "it eats quota until it is deleted"
    if queue == "DELETING" or (node == "DELETING" and queue is None):
        assert (now.life, now.wanted, now.unwanted) == (Life.DELETING, Action.WAIT, Action.WAIT)
    if now.wanted is Action.KEEP:
        assert node is not None, "nothing is kept that has no node"
    if node == "READY" and queue in (None, "PROVISIONING", "ACTIVE"):
        assert now.life is Life.READY


def test_from_every_state_our_actions_lead_to_ready_or_gone() -> None:
    """Waiting and keeping are bounded by time (a slice that is too long in its state counts as LOST), the other actions end the state."""
    bounded = {Life.PENDING, Life.INTERRUPTED, Life.DELETING}
    for now in TRANSITIONS.values():
        acts = {Action.CREATE, Action.REPLACE, Action.DELETE}
        assert now.life is Life.READY or now.wanted in acts or now.life in bounded
        assert now.life is Life.GONE or now.unwanted in acts or now.life is Life.DELETING


def test_a_state_that_a_later_api_adds_is_left_alone_at_first() -> None:
    assert step("FROZEN", None).life is Life.INTERRUPTED
    assert step(None, "DREAMING").life is Life.PENDING
