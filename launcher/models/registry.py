"""The model families and their variants, by name. A new family is one file in `launcher/models/families/`."""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from launcher.models import families
from launcher.models.hf import HFTensor
from launcher.models.variants import Variant

if TYPE_CHECKING:
    import jax

    from launcher.models.interface import BuildOptions, Decoder


class Family(Protocol):
    """A module of `launcher.models.families`. The command line imports it, so it imports JAX only inside `build`."""

    VARIANTS: Mapping[str, Variant]
    """The published sizes; names are unique over all families."""

    def build(self, variant: Variant, key: "jax.Array", options: "BuildOptions") -> "Decoder":
        """A new decoder. Called under `jax.jit` with shardings, so that no host ever holds it whole."""
        ...

    def hf_config(self, variant: Variant, dtype: str, max_positions: int) -> dict[str, Any]:
        """`config.json` as transformers reads it."""
        ...

    def hf_shape(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a Variant that a `config.json` decides. Raises KeyError, ValueError, TypeError or AttributeError for another's."""
        ...

    def hf_tensors(self, variant: Variant) -> Iterator[HFTensor]:
        """Every tensor of the Hugging Face file."""
        ...


FAMILIES: dict[str, Family] = {
    module.name: cast(Family, importlib.import_module(f"{families.__name__}.{module.name}"))
    for module in pkgutil.iter_modules(families.__path__)
}
VARIANTS: dict[str, Variant] = {name: variant for family in FAMILIES.values() for name, variant in family.VARIANTS.items()}
