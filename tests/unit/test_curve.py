"""What a resume refuses: whatever would change the meaning of the loss curve, each with what it was and what it is."""

import dataclasses
import json
from typing import Any

import pytest

from cluster.errors import ConfigError
from launcher.config import RESUME_TOPICS, TrainingConfig
from launcher.curve import check_same_curve, meaning_of

BASE: dict[str, Any] = {"model": {"variant": "gemma3-nano"}, "data": {"source": "text", "path": "/a"}, "trainer": {}}


def meaning(key: str | None = "a" * 32, weights: str | None = "c" * 64, **groups: dict[str, Any]) -> dict[str, Any]:
    values = {name: {**BASE[name], **groups.get(name, {})} for name in BASE}
    return meaning_of(TrainingConfig.from_dict(values), key, weights)


CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("model", {"model": {"variant": "gemma3-270m"}}, "model.variant from gemma3-nano to gemma3-270m"),
    ("model", {"model": {"weights": "/b"}}, "model.weights from None to /b"),
    ("model", {"weights": "d" * 64}, "the content of model.weights (digest cccccccc to dddddddd)"),
    ("data", {"data": {"held_out": 0.1}}, "data.held_out from 0.02 to 0.1"),
    ("data", {"data": {"max_bytes": 5}}, "data.max_bytes from None to 5"),
    ("data", {"data": {"source": "jsonl"}}, "data.source from text to jsonl"),
    ("data", {"key": "b" * 32}, "the content of the data (digest aaaaaaaa to bbbbbbbb)"),
    ("seed", {"trainer": {"seed": 1}}, "trainer.seed from 0 to 1"),
    ("batch_size", {"trainer": {"batch_size": 16}}, "trainer.batch_size from 8 to 16"),
    ("seq_len", {"trainer": {"seq_len": 64}, "key": "b" * 32}, "trainer.seq_len from 128 to 64"),
    ("compute_dtype", {"trainer": {"compute_dtype": "bfloat16"}}, "trainer.compute_dtype from float32 to bfloat16"),
    ("optimizer", {"trainer": {"schedule": "linear"}}, "trainer.schedule from cosine to linear"),
    ("optimizer", {"trainer": {"beta2": 0.99}}, "trainer.beta2 from 0.95 to 0.99"),
]


@pytest.mark.parametrize(("topic", "change", "told"), CHANGES, ids=[told for _, _, told in CHANGES])
def test_a_change_is_refused_by_name_unless_it_is_allowed(topic: str, change: dict[str, Any], told: str) -> None:
    before, now = meaning(), meaning(**change)
    with pytest.raises(ConfigError) as caught:
        check_same_curve(before, now, [], "checkpoint 20")
    line = str(caught.value)
    assert line.startswith(f"checkpoint 20 was made with other settings: {told}")
    assert line.endswith(f"run.allow=[{topic}]")
    assert "\n" not in line
    check_same_curve(before, now, [topic], "checkpoint 20")
    with pytest.raises(ConfigError):
        check_same_curve(before, now, [other for other in RESUME_TOPICS if other != topic], "checkpoint 20")


def test_every_topic_has_a_change_that_it_allows() -> None:
    assert {topic for topic, _, _ in CHANGES} == set(RESUME_TOPICS)


def test_several_changes_are_told_together() -> None:
    now = meaning(trainer={"seed": 1, "batch_size": 16})
    with pytest.raises(ConfigError, match=r"seed from 0 to 1; trainer.batch_size from 8 to 16; .*run.allow=\[seed,batch_size\]"):
        check_same_curve(meaning(), now, [], "the run")
    with pytest.raises(ConfigError, match=r"run.allow=\[batch_size\]"):
        check_same_curve(meaning(), now, ["seed"], "the run")


def test_what_does_not_change_the_curve_may_change() -> None:
    free = {"steps": 999, "log_every": 1, "checkpoint_every": "auto", "keep_checkpoints": 1, "eval_batches": 1, "mesh": {"fsdp": 8}}
    check_same_curve(meaning(), meaning(trainer=free, data={"path": "/moved"}), [], "the run")


def test_a_default_learning_rate_written_out_is_no_change() -> None:
    rate = TrainingConfig.from_dict(BASE).learning_rate
    check_same_curve(meaning(), meaning(trainer={"lr": rate}), [], "the run")


def test_before_data_and_weights_are_at_hand_their_content_is_not_compared() -> None:
    check_same_curve(meaning(key=None, weights=None), meaning(), [], "the run")


def test_weights_may_lie_elsewhere_and_their_content_decides() -> None:
    before, moved = (meaning(model={"weights": path}) for path in ("/a", "gs://b/c"))
    check_same_curve(before, moved, [], "the run")
    with pytest.raises(ConfigError, match=r"the content of model.weights \(digest c+ to d+\)"):
        check_same_curve(before, meaning(model={"weights": "/a"}, weights="d" * 64), [], "the run")


def test_another_shape_under_the_same_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.models.registry import VARIANTS

    before = meaning()
    monkeypatch.setitem(VARIANTS, "gemma3-nano", dataclasses.replace(VARIANTS["gemma3-nano"], d_ff=384))
    with pytest.raises(ConfigError, match=r"model.d_ff from \d+ to 384"):
        check_same_curve(before, meaning(), [], "the run")


def test_it_survives_the_json_of_a_checkpoint() -> None:
    assert json.loads(json.dumps(meaning())) == meaning()
