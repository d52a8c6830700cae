"""Every accelerator type that the Cloud TPU API serves, with what a launcher has to know about it.

Sources: Google's pages "TPU v3", "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU software versions" (names, topologies, hosts, runtime
versions, peak FLOP/s, memory and its bandwidth, "All-reduce bandwidth per Pod" or half of "Bidirectional inter-chip interconnect (ICI)
bandwidth", "Data center network bandwidth" per chip or per Pod); the bf16 peak of v2 comes from a secondary source, its bandwidths from
Jouppi et al., "A domain-specific supercomputer for training deep neural networks" (CACM 63/7, 2020). The number in a name counts
TensorCores for v2, v3, v4 and v5p (two a chip) and chips for v5e and v6e. TPU7x is not served by this API.
"""

import functools
import itertools
import math
import re
from dataclasses import dataclass

from cluster.errors import ConfigError

PRICES_AS_OF = "list prices of an undated snapshot (SkyPilot catalog v8), main US region; of differing spot prices the higher one"
"""Where `usd_per_chip_hour*` come from. An estimate for plans and accounts, not a bill."""


@dataclass(frozen=True)
class AcceleratorType:
    """One kind of slice: an accelerator type in one topology."""

    name: str
    """The API's name, such as v4-16 or v5litepod-8."""
    generation: str
    """v2, v3, v4, v5e, v5p or v6e."""
    topology: str
    """Chips along each axis of the slice, such as 2x2x2."""
    chips: int
    hosts: int
    chips_per_host: int
    runtime_version: str
    """The VM image that JAX wants; with another one the VM boots and the TPU stays invisible."""
    peak_bf16_tflops: float
    """A chip's peak, 1e12 bf16 floating-point operations a second."""
    hbm_gib: float
    """A chip's memory, GiB."""
    hbm_gb_per_s: float
    """Bandwidth of a chip's memory, 1e9 bytes a second."""
    ici_gb_per_s: float
    """What a chip takes in over all its links to other chips of the slice, 1e9 bytes a second; it sends as much."""
    dcn_gb_per_s: float | None
    """A chip's share of the network between slices, 1e9 bytes a second; None where Google's pages name none."""
    usd_per_chip_hour: float | None
    usd_per_chip_hour_spot: float | None

    @property
    def default_topology(self) -> bool:
        """Whether the name alone means this topology. If not, a request has to carry the topology as well."""
        return by_name()[self.name].topology == self.topology


@dataclass(frozen=True)
class _Generation:
    name: str
    prefix: str
    units_per_chip: int
    """What the number in a type's name counts, per chip."""
    runtime_version: str
    peak_bf16_tflops: float
    hbm_gib: float
    hbm_gb_per_s: float
    ici_gb_per_s: float
    dcn_gb_per_s: float | None
    usd: float
    usd_spot: float
    topologies: tuple[str, ...]
    """In order: of several topologies with the same number of chips the first is the default."""


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_FLAT_V3 = ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")


def _cubes(limit: int) -> tuple[str, ...]:
    """All topologies made of 4x4x4 cubes, up to `limit` cubes, the most compact of each size first (as the service chooses them)."""
    found = [
        (a * b * c, a + b + c, (4 * a, 4 * b, 4 * c))
        for a, b in itertools.combinations_with_replacement(range(1, limit + 1), 2)
        if a * b <= limit
        for c in range(b, limit // (a * b) + 1)
    ]
    return tuple("x".join(map(str, axes)) for _, _, axes in sorted(found))


_GENERATIONS = {
    generation.name: generation
    for generation in (
        _Generation("v2", "v2", 2, "tpu-ubuntu2204-base", 45, 16, 700, 248, None, 1.125, 0.34, ("2x2", "4x4", "8x8", "8x16", "16x16")),
        _Generation("v3", "v3", 2, "tpu-ubuntu2204-base", 123, 32, 900, 332, None, 2.00, 0.51, (*_FLAT_V3, "16x32", "32x32")),
        _Generation("v4", "v4", 2, "tpu-ubuntu2204-base", 275, 32, 1200, 268, None, 3.22, 0.92, (*_SMALL_3D, *_cubes(64))),
        _Generation("v5e", "v5litepod", 1, "v2-alpha-tpuv5-lite", 197, 16, 819, 200, 3.125, 1.20, 0.60, _FLAT),
        _Generation("v5p", "v5p", 2, "v2-alpha-tpuv5", 459, 95, 2765, 600, 6.25, 4.20, 1.68, (*_SMALL_3D, *_cubes(96))),
        _Generation("v6e", "v6e", 1, "v2-alpha-tpuv6e", 918, 32, 1640, 400, 12.5, 2.70, 1.22, _FLAT),
    )
}
GENERATIONS = tuple(_GENERATIONS)


def all_types() -> list[AcceleratorType]:
    """Every accelerator type in its default topology, generation by generation, small to large."""
    return list(by_name().values())


def lookup(name: str) -> AcceleratorType:
    """The accelerator type called `name` in its default topology; `v5e-16` means `v5litepod-16`. Raises ConfigError."""
    kind = by_name().get(_api_name(name))
    if kind is None:
        raise ConfigError(f"accelerator_type {name!r} does not exist; nearest: {', '.join(_nearest_names(_api_name(name)))}")
    return kind


def topologies_of(name: str) -> list[str]:
    """Every topology that the type `name` comes in, the default first. Raises ConfigError."""
    kind = lookup(name)
    return [t.topology for t in _topologies()[kind.generation].values() if t.name == kind.name]


def check_generation(name: str) -> str:
    """The generation that `name` means (v5litepod: v5e). Raises ConfigError for an unknown one."""
    return _generation(name.strip().lower()).name


def resolve(accelerator_type: str | None = None, generation: str | None = None, topology: str | None = None) -> AcceleratorType:
    """The one slice kind that the given settings mean: a type, a type with a topology, or a generation with a topology.

    Raises ConfigError, naming the nearest valid settings, when they contradict each other or mean nothing.
    """
    if accelerator_type is None:
        return _resolve_topology(generation, topology)
    kind = lookup(accelerator_type)
    if generation is not None and _generation(generation).name != kind.generation:
        raise ConfigError(f"accelerator_type {kind.name!r} is of generation {kind.generation!r}, not {generation!r}; leave generation out")
    if topology is None or topology.lower() == kind.topology:
        return kind
    same_size = {t.topology: t for t in _topologies()[kind.generation].values() if t.name == kind.name}
    if topology.lower() not in same_size:
        raise ConfigError(f"topology {topology!r} is not one of {kind.name!r}; it has: {', '.join(same_size)}")
    return same_size[topology.lower()]


def _resolve_topology(generation: str | None, topology: str | None) -> AcceleratorType:
    if generation is None:
        what = "accelerator_type is missing" if topology is None else f"topology {topology!r} needs generation as well"
        raise ConfigError(f"{what}; give accelerator_type (such as v4-16), or generation and topology (such as v4 and 2x2x2)")
    known = _topologies()[_generation(generation).name]
    if topology is None:
        raise ConfigError(f"generation {generation!r} needs a topology as well; its smallest: {', '.join(list(known)[:4])}")
    if topology.lower() not in known:
        near = ", ".join(_nearest_topologies(topology.lower(), known))
        raise ConfigError(f"topology {topology!r} does not exist in generation {generation!r}; nearest: {near}")
    return known[topology.lower()]


@functools.cache
def by_name() -> dict[str, AcceleratorType]:
    """Every type in its default topology, by the API's name. Not to be changed by the caller."""
    types: dict[str, AcceleratorType] = {}
    for known in _topologies().values():
        for kind in known.values():
            types.setdefault(kind.name, kind)
    return types


@functools.cache
def _topologies() -> dict[str, dict[str, AcceleratorType]]:
    return {g.name: {topology: _make(g, topology) for topology in g.topologies} for g in _GENERATIONS.values()}


def _make(generation: _Generation, topology: str) -> AcceleratorType:
    chips = math.prod(_axes(topology))
    # v5e and v6e put up to 8 chips on one VM; every other slice is made of VMs with 4 chips.
    per_host = chips if topology in ("1x1", "2x2", "2x4") else 4
    return AcceleratorType(
        name=f"{generation.prefix}-{chips * generation.units_per_chip}",
        generation=generation.name,
        topology=topology,
        chips=chips,
        hosts=chips // per_host,
        chips_per_host=per_host,
        runtime_version=generation.runtime_version,
        peak_bf16_tflops=generation.peak_bf16_tflops,
        hbm_gib=generation.hbm_gib,
        hbm_gb_per_s=generation.hbm_gb_per_s,
        ici_gb_per_s=generation.ici_gb_per_s,
        dcn_gb_per_s=generation.dcn_gb_per_s,
        usd_per_chip_hour=generation.usd,
        usd_per_chip_hour_spot=generation.usd_spot,
    )


def _api_name(name: str) -> str:
    return re.sub(r"^v5e-", "v5litepod-", name.strip().lower())


def _generation(name: str) -> _Generation:
    found = _GENERATIONS.get("v5e" if name == "v5litepod" else name)
    if found is None:
        raise ConfigError(f"generation {name!r} does not exist; known: {', '.join(GENERATIONS)}")
    return found


def _nearest_names(name: str) -> list[str]:
    """Types of the same generation with the nearest sizes; without such a generation, the smallest type of each."""
    prefix, _, number = name.rpartition("-")
    sizes = [int(known.rpartition("-")[2]) for known in by_name() if known.rpartition("-")[0] == prefix]
    if sizes and number.isdecimal():
        near = sorted(sorted(sizes, key=lambda size: abs(size - int(number)))[:3])
        return [f"{prefix}-{size}" for size in near]
    return [next(kind.name for kind in by_name().values() if kind.generation == generation) for generation in GENERATIONS]


def _nearest_topologies(topology: str, known: dict[str, AcceleratorType]) -> list[str]:
    """Of a generation's topologies those with the nearest number of chips, so that `3x3` in v4 leads to 2x2x2."""
    try:
        chips = math.prod(_axes(topology))
    except ValueError:
        return list(known)[:4]
    near = sorted(known, key=lambda name: (abs(known[name].chips - chips), name))[:3]
    return sorted(near, key=lambda name: known[name].chips)


def _axes(topology: str) -> tuple[int, ...]:
    """Chips along each axis. Raises ValueError when it is not numbers joined by x."""
    return tuple(int(axis) for axis in topology.split("x"))
