"""What is printed before a launch: what will run, where, and what that costs."""

from launcher.config import LaunchConfig
from launcher.data.config import SourceConfig
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
    training, trainer = config.training, config.trainer
    model, data = training.model, training.data
    mesh = training.check_devices(config.slices.chips)
    others = ", ".join(name for name in VARIANTS if name != model.variant)
    return [
        ("model", f"{model.variant}, {_count(model.shape.parameters)} parameters; choose another with model.variant={others}"),
        ("data", "; ".join(_describe_source(*source) for source in data.sources())),
        *([("tokenizer", data.tokenizer)] if data.tokenizer else []),
        (
            "training",
            f"{trainer.steps} steps of {trainer.batch_size} x {trainer.seq_len} tokens, learning rate {training.learning_rate:g}, "
            f"{trainer.compute_dtype}, mesh data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor}",
        ),
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
