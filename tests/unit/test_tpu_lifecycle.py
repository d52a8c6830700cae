"""What the states of the API mean."""

from google.cloud import tpu_v2

from cluster.tpu.lifecycle import LIFE_OF_STATE, Life, life


def test_every_state_of_the_api_has_a_meaning() -> None:
    assert set(tpu_v2.Node.State.__members__) == set(LIFE_OF_STATE)


def test_no_node_is_gone() -> None:
    assert life(None) is Life.GONE
