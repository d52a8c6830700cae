"""The pauses before something that died is started again."""

from collections.abc import Iterator


def restart_delays(first: float = 1.0, factor: float = 2.0, longest: float = 30.0) -> Iterator[float]:
    """Seconds to wait before each further start on this machine."""
    delay = first
    while True:
        yield delay
        delay = min(delay * factor, longest)
