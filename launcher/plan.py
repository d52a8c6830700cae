"""What is printed before a launch: what will run, where, and what that costs."""

from launcher.config import LaunchConfig
from launcher.data.config import SourceConfig
from launcher.estimate.memory import GIB
from launcher.estimate.run import estimate_of
from launcher.models.registry import VARIANTS
from launcher.runs import RunDirectory


def describe(config: LaunchConfig, run: RunDirectory) -> list[tuple[str, str]]:
    """(title, text) lines of the plan."""
    cluster, kind = config.slices, config.slices.accelerator
    return [
        ("run", f"{run.run_id}{' (resumed)' if config.run.resume else ''}"),
        *(_describe_script(config) if config.is_script else _describe_training(config)),
        (
            "cluster",
            f"{cluster.name}: {cluster.slices} x {kind.name} ({kind.topology}), {cluster.hosts} hosts, {cluster.chips} chips, "
            f"{cluster.provisioning}{', emulated on this machine' if cluster.cloud == 'emulated' else ''}",
        ),
        ("price", _price(cluster.usd_per_hour)),
        ("directory", run.url),
    ]


def _describe_training(config: LaunchConfig) -> list[tuple[str, str]]:
    training, trainer = config.training_on_slices, config.trainer
    model, data = training.model, training.data
    others = ", ".join(name for name in VARIANTS if name != model.variant)
    return [
        ("model", f"{model.variant}, {_count(model.shape.parameters)} parameters; choose another with model.variant={others}"),
        ("data", "; ".join(_describe_source(*source) for source in data.sources())),
        *([("tokenizer", data.tokenizer)] if data.tokenizer else []),
        (
            "training",
            f"{trainer.steps} steps of {trainer.batch_size} x {trainer.seq_len} tokens, learning rate {training.learning_rate:g}, "
            f"{trainer.compute_dtype}, mesh {training.trainer.mesh.describe()}",
        ),
        *(_describe_estimate(config) if config.slices.cloud != "emulated" else []),
    ]


def _describe_estimate(config: LaunchConfig) -> list[tuple[str, str]]:
    """What a chip has to hold and how fast it can be at best; said before anything is paid for."""
    estimate = estimate_of(config)
    memory, time, kind = estimate.memory, estimate.time, config.slices.accelerator
    biggest = sorted(memory.by_kind().items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.2f}" for name, size in biggest)
    usd = time.usd_per_billion_tokens
    price = "" if usd is None else f", from ${usd:.0f} a billion tokens at list price"
    return [
        (
            "memory",
            f"about {memory.total / GIB:.2f} of {kind.hbm_gib:g} GiB a chip ({parts}); an estimate, tpu train check asks the compiler",
        ),
        ("speed", f"at most {time.tokens_per_second:,.0f} tokens/s, bound by {time.bound}{price}; an estimate at the chips' peaks"),
    ]


def _describe_source(where: str, source: SourceConfig, weight: float) -> str:
    part = "" if where == "data" else f"{where.rpartition('.')[2]} (weight {weight:g}): "
    return f"{part}{source.source}" + (f" from {source.path}" if source.path else "")


def _describe_script(config: LaunchConfig) -> list[tuple[str, str]]:
    return [("script", f"{config.job.entrypoint}, once a host"), ("code", str(config.run.code))]


def _price(usd_per_hour: float | None) -> str:
    return "unknown: the catalogue has none" if usd_per_hour is None else f"${usd_per_hour:.2f} an hour"


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
