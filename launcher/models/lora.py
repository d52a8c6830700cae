"""Low-rank adapters (LoRA, Hu et al. 2021): which weights are trained beside frozen ones, and what both give together."""

from dataclasses import dataclass
from typing import Any

A, B, KERNEL = "lora_a", "lora_b", "kernel"
"""Names of leaves: the adapter's two factors, and the matrix that they are added to."""


@dataclass(frozen=True)
class LoraOptions:
    """Of a model that is built with adapters."""

    rank: int
    scale: float
    """alpha / rank: what the product of the factors is multiplied by."""
    dropout: float
    targets: frozenset[str]
    """Names of the matrices that have one, as the decoder names them."""


def split(weights: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(adapters, all others) of nested dicts of weights."""
    return _pick(weights, adapters=True), _pick(weights, adapters=False)


def join(adapters: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """What `split` took apart."""
    joined = dict(others)
    for name, value in adapters.items():
        joined[name] = join(value, joined.get(name, {})) if isinstance(value, dict) else value
    return joined


def _pick(weights: dict[str, Any], *, adapters: bool) -> dict[str, Any]:
    picked: dict[str, Any] = {}
    for name, value in weights.items():
        if isinstance(value, dict):
            if below := _pick(value, adapters=adapters):
                picked[name] = below
        elif (name in (A, B)) == adapters:
            picked[name] = value
    return picked
