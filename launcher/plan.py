"""What is printed before a launch: what will run, where, and what that costs."""

from launcher.config import LaunchConfig
from launcher.models.variants import VARIANTS
from launcher.runs import RunDirectory


def describe(config: LaunchConfig, run: RunDirectory) -> list[tuple[str, str]]:
    """(title, text) lines of the plan."""
    cluster, trainer, kind = config.slices, config.trainer, config.slices.accelerator
    mesh = config.training.check_devices(cluster.chips)
    others = ", ".join(name for name in VARIANTS if name != config.model.variant)
    return [
        ("run", f"{run.run_id}{' (resumed)' if config.run.resume else ''}"),
        (
            "model",
            f"{config.model.variant}, {_count(config.model.shape.parameters)} parameters; choose another with model.variant={others}",
        ),
        ("data", config.data.source + (f" from {config.data.path}" if config.data.path else "")),
        (
            "training",
            f"{trainer.steps} steps of {trainer.batch_size} x {trainer.seq_len} tokens, learning rate {config.training.learning_rate:g}, "
            f"{trainer.compute_dtype}, mesh data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor}",
        ),
        (
            "cluster",
            f"{cluster.name}: {cluster.slices} x {kind.name} ({kind.topology}), {cluster.hosts} hosts, {cluster.chips} chips, "
            f"{cluster.provisioning}{', emulated on this machine' if cluster.cloud == 'emulated' else ''}",
        ),
        ("price", _price(cluster.usd_per_hour)),
        ("directory", run.url),
    ]


def _price(usd_per_hour: float | None) -> str:
    return "unknown: the catalogue has none" if usd_per_hour is None else f"${usd_per_hour:.2f} an hour"


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
