"""The published sizes, by the counts that the technical reports give."""

import dataclasses

import pytest

from cluster.errors import ConfigError
from launcher.models.registry import FAMILIES, VARIANTS

NON_EMBEDDING = {  # the technical reports: Gemma, table 2; Gemma 2, table 2; Gemma 3, table 1 (in millions)
    "gemma-2b": 1_981_884_416,
    "gemma-7b": 7_751_248_896,
    "gemma2-2b": 2_024_517_888,
    "gemma2-9b": 8_324_201_984,
    "gemma2-27b": 26_047_480_320,
    "gemma3-270m": pytest.approx(100e6, abs=0.5e6),
    "gemma3-1b": pytest.approx(698e6, abs=0.5e6),
    "gemma3-4b": pytest.approx(3_209e6, abs=0.5e6),
    "gemma3-12b": pytest.approx(10_759e6, abs=0.5e6),
    "gemma3-27b": pytest.approx(25_600e6, abs=0.5e6),
}


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_a_variant_has_as_many_weights_as_was_published(name: str) -> None:
    variant = VARIANTS[name]
    if name != "gemma3-nano":
        assert variant.parameters - variant.vocab * variant.d_model == NON_EMBEDDING[name]


def test_layers_alternate_as_published() -> None:
    assert [VARIANTS["gemma2-2b"].is_global(layer) for layer in range(4)] == [False, True, False, True]
    assert [layer for layer in range(26) if VARIANTS["gemma3-1b"].is_global(layer)] == [5, 11, 17, 23]
    assert all(VARIANTS["gemma-2b"].is_global(layer) for layer in range(18))


def test_flops_count_each_pair_that_a_layer_computes() -> None:
    base = dataclasses.replace(VARIANTS["gemma3-nano"], layers=1, window=3, local_per_global=5)
    matrices = 6.0 * (base.parameters - 4 * base.d_model - 2 * base.head_dim - base.d_model)
    per_pair = 12.0 * base.heads * base.head_dim
    assert base.flops_per_token(5) == pytest.approx(matrices + per_pair * (1 + 2 + 3 + 3 + 3) / 5)
    everywhere = dataclasses.replace(base, window=None)
    assert everywhere.flops_per_token(5) == pytest.approx(matrices + per_pair * 3)


def test_every_file_of_the_families_is_a_family_with_its_own_variants() -> None:
    for name, family in FAMILIES.items():
        assert family.VARIANTS
        assert all(variant.family == name for variant in family.VARIANTS.values())
        assert all(VARIANTS[key] is variant for key, variant in family.VARIANTS.items())


def test_a_mesh_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer.mesh.tensor 16 does not divide the model's heads of 8"):
        VARIANTS["gemma-2b"].check_sharding(fsdp=1, tensor=16)
