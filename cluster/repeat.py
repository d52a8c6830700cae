"""Calls of Google's services that are repeated while the service stumbles, and that raise errors of ours."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from cluster.cloud_errors import DeadlineExceededError, RateLimitedError, Service, TransientError, from_exception

T = TypeVar("T")
STUMBLES = (TransientError, DeadlineExceededError)
"""After these the same call may succeed."""
SAFE: tuple[type[Exception], ...] = (*STUMBLES, RateLimitedError)
"""After these a call that may be made twice is repeated."""
_RATE_PAUSE_S = 5.0
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),  # 4 MiB by default; a longer list fails with RESOURCE_EXHAUSTED, which looks like quota
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),  # a service that comes back is found at once; the default goes up to two minutes
)
"""Of every gRPC channel that we make ourselves."""


class Repeater:
    """Calls of one service. Safe to use from several threads."""

    def __init__(
        self,
        service: Service,
        *,
        patience: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`patience`: seconds after which a call is not repeated any more."""
        self._service, self._patience = service, patience
        self._clock, self._sleep, self._jitter = clock, sleep, jitter

    def call(self, call: Callable[[], T], resource: str, zone: str | None = None, repeat: tuple[type[Exception], ...] = SAFE) -> T:
        """`call`, repeated while the service answers with one of `repeat`. Raises CloudError."""
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError

        deadline = self._clock() + self._patience
        pause = 0.25
        while True:
            try:
                return call()
            except (GoogleAPIError, GoogleAuthError, OSError) as raised:
                error = from_exception(raised, service=self._service, resource=resource, zone=zone)
                wait = max(pause, _RATE_PAUSE_S) if isinstance(error, RateLimitedError) else pause
                if not isinstance(error, repeat) or self._clock() + wait > deadline:
                    raise error from raised
            self._sleep(wait * (0.5 + self._jitter() / 2))
            pause = min(pause * 2, 10.0)
