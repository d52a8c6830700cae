"""Waiting at boot for what may not be there yet: rights that were granted a moment ago, a service that stumbles."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from cluster.errors import PodlaunchError
from cluster.vm.restart import restart_delays

logger = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE_S = 900.0
"""New rights of a service account take up to 7 minutes to work everywhere (https://cloud.google.com/iam/docs/access-change-propagation)."""


def patiently(
    ask: Callable[[], T],
    *,
    patience: float = PATIENCE_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """What `ask` returns, asked again while it raises PodlaunchError and `patience` seconds are not over."""
    deadline = clock() + patience
    for delay in restart_delays():
        try:
            return ask()
        except PodlaunchError as error:
            if clock() + delay > deadline:
                raise
            logger.warning("%s; trying again in %.0f s", error, delay)
            sleep(delay)
    raise AssertionError("the delays never end")
