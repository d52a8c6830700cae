"""The catalogue of accelerator types."""

import math

import pytest

from cluster.errors import ConfigError
from cluster.tpu.catalog import GENERATIONS, all_types, by_name, lookup, resolve


@pytest.mark.parametrize(
    ("name", "topology", "chips", "hosts"),
    [
        ("v2-8", "2x2", 4, 1),
        ("v2-512", "16x16", 256, 64),
        ("v3-32", "4x4", 16, 4),
        ("v3-2048", "32x32", 1024, 256),
        ("v4-8", "2x2x1", 4, 1),
        ("v4-16", "2x2x2", 8, 2),
        ("v4-64", "2x4x4", 32, 8),
        ("v4-512", "4x8x8", 256, 64),
        ("v4-1024", "8x8x8", 512, 128),
        ("v4-8192", "16x16x16", 4096, 1024),
        ("v5litepod-1", "1x1", 1, 1),
        ("v5litepod-8", "2x4", 8, 1),
        ("v5litepod-16", "4x4", 16, 4),
        ("v5p-12288", "16x16x24", 6144, 1536),
        ("v6e-8", "2x4", 8, 1),
        ("v6e-256", "16x16", 256, 64),
    ],
)
def test_lookup_documented_type_has_documented_shape(name: str, topology: str, chips: int, hosts: int) -> None:
    kind = lookup(name)
    assert (kind.name, kind.topology, kind.chips, kind.hosts) == (name, topology, chips, hosts)


def test_all_types_are_consistent() -> None:
    for kind in all_types():
        assert kind.chips == kind.hosts * kind.chips_per_host == math.prod(int(axis) for axis in kind.topology.split("x"))
        assert kind.default_topology
        assert resolve(generation=kind.generation, topology=kind.topology) == kind
    assert {kind.generation for kind in all_types()} == set(GENERATIONS)
    assert len(all_types()) == len(by_name())


def test_lookup_v5e_alias_gives_api_name() -> None:
    assert lookup("v5e-16") is lookup("v5litepod-16")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"accelerator_type": "v4-17"}, "'v4-17' does not exist; nearest: v4-8, v4-16, v4-32"),
        ({"accelerator_type": "h100-8"}, "nearest: v2-8, v3-8, v4-8, v5litepod-1, v5p-8, v6e-1"),
        ({"generation": "v4", "topology": "3x3"}, "topology '3x3' does not exist in generation 'v4'; nearest: 2x2x1, 2x2x2, 2x2x4"),
        ({"generation": "v5e", "topology": "cube"}, "nearest: 1x1, 2x2, 2x4, 4x4"),
        ({"generation": "v7", "topology": "2x2x1"}, "generation 'v7' does not exist; known: v2, v3, v4, v5e, v5p, v6e"),
        ({"generation": "v4"}, "needs a topology"),
        ({"topology": "2x2x1"}, "needs generation"),
        ({}, "accelerator_type is missing"),
        ({"accelerator_type": "v4-16", "generation": "v5p"}, "is of generation 'v4', not 'v5p'"),
        ({"accelerator_type": "v4-16", "topology": "4x4x4"}, "not one of 'v4-16'; it has: 2x2x2"),
    ],
)
def test_resolve_impossible_settings_names_nearest(settings: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(**settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resolve_other_topology_of_a_type_is_marked_as_not_default() -> None:
    kind = resolve("v4-512", topology="4x4x16")
    assert (kind.name, kind.chips, kind.default_topology) == ("v4-512", 256, False)
