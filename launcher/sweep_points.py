"""The points of a sweep: what differs among them, and which run each of them is.

A point's run is named by its settings, so that the same command finds the runs of the one before:

    <run.name, or what runs>-<what differs>-<hash of the resolved config>       gemma3-nano-lr-1e-5-3f2a91c4
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from cluster.errors import ConfigError
from launcher.compose import explain, load
from launcher.config import LaunchConfig

_PLACE = ("name", "root", "resume")
"""Of `run`: where a run is and what it is called is no part of what it does."""
_LONGEST_NAME = 63
_DIGITS = 8


@dataclass(frozen=True)
class Point:
    """One combination of settings, and by that one run."""

    number: int
    """In the sweep, from 1."""
    overrides: tuple[str, ...]
    """What differs among the points, as `key=value`."""
    config: LaunchConfig
    """With the name of its run."""

    @property
    def run_id(self) -> str:
        assert self.config.run.name is not None
        return self.config.run.name

    @property
    def words(self) -> str:
        return " ".join(self.overrides)


def compose_points(loader: ConfigLoader, master: DictConfig, batch: Iterable[Sequence[str]], first: int = 1) -> list[Point]:
    """One for each list of overrides, in their order. `first` is the number of the first of them in the sweep.

    Raises ConfigError, one line that names the point, when any of them is wrong.
    """
    fixed = _fixed(loader, master)
    points = []
    for number, overrides in enumerate(batch, start=first):
        varied = tuple(override for override in overrides if override.partition("=")[0] not in fixed)
        try:
            points.append(_named(number, varied, _compose(loader, master, overrides)))
        except (HydraException, OmegaConfBaseException, ConfigError) as error:
            why = str(error) if isinstance(error, ConfigError) else explain(error)
            raise wrong_point(number, varied, why) from error
    return points


def wrong_point(number: int, overrides: Sequence[str], why: object) -> ConfigError:
    return ConfigError(f"point {number} of the sweep ({' '.join(overrides) or 'nothing differs'}): {why}")


def _fixed(loader: ConfigLoader, master: DictConfig) -> set[str]:
    """The settings that the command line gives to every point alike."""
    given = OverridesParser.create(config_loader=loader).parse_overrides(list(master.hydra.overrides.task))
    return {override.get_key_element() for override in given if not override.is_sweep_override()}


def _compose(loader: ConfigLoader, master: DictConfig, overrides: Sequence[str]) -> LaunchConfig:
    composed = loader.load_sweep_config(master, list(overrides))
    with open_dict(composed):
        del composed["hydra"]  # it has values of its own that are known in a job of Hydra's only
    return load(composed).with_absolute_paths()


def _named(number: int, varied: tuple[str, ...], config: LaunchConfig) -> Point:
    settings = config.to_dict()
    settings["run"] = {key: value for key, value in settings["run"].items() if key not in _PLACE}
    words = [_slug(config.run.name or config.what), *map(_describe, varied)]
    readable = "-".join(word for word in words if word)[: _LONGEST_NAME - _DIGITS - 1].rstrip("-._")
    run = dataclasses.replace(config.run, name=f"{readable}-{_digest(settings)}", resume=False)
    return Point(number, varied, dataclasses.replace(config, run=run))


def _describe(override: str) -> str:
    """trainer.lr=1e-5: lr-1e-5."""
    key, _, value = override.partition("=")
    return _slug(f"{key.rpartition('.')[2]}-{value}")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-._")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_DIGITS]
