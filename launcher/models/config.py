"""Which model is trained: the `model` part of a configuration."""

from dataclasses import dataclass, field

from cluster.errors import ConfigError
from cluster.schema import at_least, did_you_mean
from launcher.models.registry import FAMILIES, VARIANTS
from launcher.models.variants import Variant

WEIGHT_SCHEMES = ("gs", "hf")


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices of a layer, as they are called on the hub."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen weights (LoRA); without them all weights are trained."""

    rank: int = 0
    """Of the adapters; 0: none, all weights are trained."""
    alpha: float | None = None
    """Adapters count alpha / rank times; null: twice the rank."""
    dropout: float = 0.0
    """The share of an adapter's inputs that training leaves out."""
    targets: list[str] = field(default_factory=lambda: list(TARGETS))
    """Which matrices of every layer have one."""
    merge: bool = False
    """Whether the export is the whole model with the adapters added, instead of the adapters alone (PEFT's format)."""

    def __post_init__(self) -> None:
        at_least("model.lora.rank", self.rank, 0)
        if self.alpha is not None and not self.alpha > 0:
            raise ConfigError(f"model.lora.alpha {self.alpha}: give a positive number, or null for twice the rank")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.lora.dropout {self.dropout}: give a number from 0 to below 1")
        if not self.targets:
            raise ConfigError(f"model.lora.targets is empty: give some of {', '.join(TARGETS)}")
        for target in self.targets:
            if target not in TARGETS:
                raise ConfigError(f"model.lora.targets: {target!r} is unknown{did_you_mean(target, TARGETS)}")

    @property
    def scale(self) -> float:
        """What the product of an adapter's factors is multiplied by."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained. `variant` fixes its shape (launcher/models/families/)."""

    variant: str
    family: str = "gemma"
    weights: str | None = None
    """The folder to start from, in the Hugging Face format, whose tokenizer is used then: a local path, gs://<bucket>/<folder> or
    hf://<organisation>/<model>[@<revision>]. Null: random weights and a token for each byte.
    """

    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        if self.lora.rank and self.weights is None:
            raise ConfigError("model.lora.rank needs model.weights: adapters are trained beside the weights of a model")
        if self.family not in FAMILIES:
            raise ConfigError(f"model.family {self.family!r} is unknown{did_you_mean(self.family, FAMILIES)}")
        known = [name for name, variant in VARIANTS.items() if variant.family == self.family]
        if self.variant not in known:
            raise ConfigError(f"model.variant {self.variant!r} is unknown{did_you_mean(self.variant, known)}")
        if self.weights is not None and "://" in self.weights:
            scheme, _, rest = self.weights.partition("://")
            if scheme not in WEIGHT_SCHEMES or "/" not in rest.strip("/"):
                raise ConfigError(f"model.weights {self.weights}: give a local path, gs://<bucket>/<folder> or hf://<organisation>/<model>")

    @property
    def shape(self) -> Variant:
        return VARIANTS[self.variant]
