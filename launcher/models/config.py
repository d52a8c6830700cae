"""Which model is trained: the `model` part of a configuration."""

from dataclasses import dataclass

from cluster.errors import ConfigError
from cluster.schema import did_you_mean
from launcher.models.registry import FAMILIES, VARIANTS
from launcher.models.variants import Variant

WEIGHT_SCHEMES = ("gs", "hf")


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained. `variant` fixes its shape (launcher/models/families/)."""

    variant: str
    family: str = "gemma"
    weights: str | None = None
    """The folder to start from, in the Hugging Face format, whose tokenizer is used then: a local path, gs://<bucket>/<folder> or
    hf://<organisation>/<model>[@<revision>]. Null: random weights and a token for each byte.
    """

    def __post_init__(self) -> None:
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
