"""What gives a loss curve its meaning: a run goes on from a checkpoint only when all of it is as it was, or the user says so.

Free to change on a resume: the cluster, the mesh, the number of hosts, trainer.steps (the learning rate decays over the new number),
logging, evaluation and checkpointing.
"""

from collections.abc import Collection, Mapping
from typing import Any

from cluster.errors import ConfigError
from launcher.config import RESUME_TOPICS, TrainingConfig

Meaning = Mapping[str, Any]
"""Dotted setting -> value, as plain JSON."""

_OPTIMIZER = (
    *("optimizer", "lr", "schedule", "warmup_steps", "final_lr_fraction", "weight_decay", "no_decay"),
    *("momentum", "beta1", "beta2", "epsilon", "max_grad_norm"),
)
_TRAINER = {name: name for name in ("seed", "batch_size", "seq_len", "compute_dtype")} | dict.fromkeys(_OPTIMIZER, "optimizer")
_CONTENTS = {"data.content": "the content of the data", "model.content": "the content of model.weights"}
assert set(RESUME_TOPICS) == {"model", "data", *_TRAINER.values()}


def meaning_of(config: TrainingConfig, data_key: str | None = None, weights_key: str | None = None) -> dict[str, Any]:
    """`data_key` is the digest of the packed data, `weights_key` that of model.weights; None where they are not at hand. Their paths do not
    matter, their content does.
    """
    shape = {f"model.{name}": value for name, value in vars(config.model.shape).items() if name not in ("summary", "default_lr")}
    data = {"data.held_out": config.data.held_out, "data.source": config.data.source}
    for where, source, weight in config.data.sources():
        data |= {f"{where}.{name}": getattr(source, name) for name in ("source", "records", "split", "max_bytes")}
        data |= {f"{where}.fields.{name}": value for name, value in vars(source.fields).items()} | {f"{where}.weight": weight}
    lora = {f"model.lora.{name}": value for name, value in vars(config.model.lora).items() if name != "merge"}
    trainer = {f"trainer.{name}": getattr(config.trainer, name) for name in _TRAINER}
    trainer["trainer.lr"] = config.learning_rate
    content = {name: key for name, key in zip(_CONTENTS, (data_key, weights_key), strict=True) if key is not None}
    return {"model.variant": config.model.variant, "model.weights": config.model.weights, **shape, **lora, **data, **trainer, **content}


def check_same_curve(before: Meaning, now: Meaning, allow: Collection[str], where: str) -> None:
    """Raises ConfigError, one line, naming what changed from what to what, unless all of it is in `allow`."""
    changed = [name for name in _changes(before, now) if _topic(name) not in allow]
    if not changed:
        return
    told = [f"{name} from {before.get(name)} to {now.get(name)}" for name in changed if name not in _CONTENTS]
    told += [f"{what} (digest {before[name][:8]} to {now[name][:8]})" for name, what in _CONTENTS.items() if name in changed]
    topics = ",".join(dict.fromkeys(_topic(name) for name in changed))
    raise ConfigError(
        f"{where} was made with other settings: {'; '.join(told)}; change them back, choose another run.name, "
        f"or go on all the same with run.allow=[{topics}]"
    )


def _changes(before: Meaning, now: Meaning) -> list[str]:
    """Settings that both know and that differ, without those that another one's change explains."""
    names = [name for name in now if name in before and _differs(name, before[name], now[name])]
    if "model.variant" in names:  # its shape and its default learning rate
        return [name for name in names if name == "model.variant" or not (_topic(name) == "model" or name == "trainer.lr")]
    if any(name not in _CONTENTS and (_topic(name) == "data" or name == "trainer.seq_len") for name in names):
        return [name for name in names if name != "data.content"]
    return names


def _differs(name: str, before: Any, now: Any) -> bool:
    if name == "model.weights":  # where they lie is free
        return (before is None) != (now is None)
    return bool(before != now)


def _topic(name: str) -> str:
    group, setting = name.split(".", 1)
    return _TRAINER[setting] if group == "trainer" else group
