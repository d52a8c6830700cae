"""Slices without Ray, remembered so that later commands find them: `<state>/bare/<name>.json`.

`start` brings them up; what it has asked for and cannot bring up is gone again before it gives up, or remembered for `tpu stop`.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.errors import ClusterError
from cluster.state import private_dir, read_json, state_dir, write_atomic
from cluster.tpu.errors import TPUError
from cluster.tpu.provider import TPUProvider
from cluster.tpu.requests import slice_names
from cluster.tpu.status import TPUStatus

log = logging.getLogger(__name__)
_GONE_LIMIT_S = 300.0
"""A deletion takes a minute or two; what is not gone by then stays remembered."""


@dataclass(frozen=True)
class BareSlices:
    """What was asked for."""

    config: ClusterConfig
    created: float
    """Seconds since the epoch."""


def check_fits(config: ClusterConfig) -> None:
    """Raises ClusterError when slices of that name are remembered from elsewhere: they would be forgotten there and go on billing."""
    before = find(config.name)
    if before is not None and _place(before.config) != _place(config):
        kind, project, *_ = _place(before.config)
        zones = ", ".join(before.config.zones)
        raise ClusterError(
            f"slices without Ray called {config.name!r} are up already: {kind} of project {project} in {zones}; "
            f"end them with `tpu stop {config.name}`, or choose another name"
        )


def start(
    config: ClusterConfig,
    progress: Callable[[str], None],
    *,
    timeout: float | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> TPUStatus:
    """Bring up the slices of `config` and remember them. `timeout`: seconds, as for TPUProvider.start, and raises as that does.

    They are remembered from just before the first request, so that whatever happens then, the next command finds them.
    """
    check_fits(config)
    known = find(config.name) is not None
    provider = TPUProvider.connect(config)
    try:
        status = provider.start(progress=progress, timeout=timeout, before_asking=lambda: remember(config))
    except BaseException:  # an interrupt as well
        if not known and find(config.name) is not None:
            progress("deleting what was made")
            if _gone(config, sleep, clock):
                forget(config.name)
        raise
    remember(config)  # slices that were there already and known to nobody here
    return status


def _gone(config: ClusterConfig, sleep: Callable[[float], None], clock: Callable[[], float]) -> bool:
    """Whether the slices are gone in good time; while they are going, or where the service does not tell, somebody has to know them."""
    deadline, names = clock() + _GONE_LIMIT_S, slice_names(config)
    try:
        provider = TPUProvider.connect(config, patience=5.0)
        while any(item.name in names for item in provider.list_slices()):
            if clock() > deadline:
                break
            sleep(0.5)
        else:
            return True
    except TPUError as error:
        log.info("%s", error)
    log.warning("something may be left behind: look with `tpu status`, delete it with `tpu stop %s`", config.name)
    return False


def _place(config: ClusterConfig) -> tuple[str, str, str | None, tuple[str, ...]]:
    """Which service has the slices, and as what."""
    endpoint = None if config.cloud == "emulated" else config.endpoint  # the emulated cloud may have moved
    return config.accelerator.name, config.effective_project, endpoint, tuple(sorted(config.effective_zones))


def remember(config: ClusterConfig) -> None:
    """To be called before the first request: whatever happens next, the next command finds it."""
    write_atomic(_path(config.name), json.dumps({"config": config.to_dict(), "created": time.time()}, indent=1))


def forget(name: str) -> None:
    _path(name).unlink(missing_ok=True)


def find(name: str) -> BareSlices | None:
    found = read_json(_path(name))
    return None if found is None else BareSlices(ClusterConfig.from_dict(found["config"]), found["created"])


def list_bare() -> list[BareSlices]:
    names = sorted(path.stem for path in _folder().glob("*.json"))
    return [found for name in names if (found := find(name)) is not None]


def _path(name: str) -> Path:
    return _folder() / f"{name}.json"


def _folder() -> Path:
    return private_dir(state_dir() / "bare")
