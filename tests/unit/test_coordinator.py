"""Who comes before the coordinator waits for its port, and not for ever."""

import socket

from launcher.training.coordinator import LIMIT_S, LOOK_S, await_coordinator


def test_it_returns_as_soon_as_somebody_serves() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        waited: list[float] = []

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            if len(waited) == 3:
                server.listen()

        assert await_coordinator(address, sleep=sleep)
        assert waited == [LOOK_S] * 3


def test_after_its_limit_jax_may_say_what_is_wrong() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))  # nobody serves there
        times = iter([0.0, 0.0, LIMIT_S])
        assert not await_coordinator(f"127.0.0.1:{server.getsockname()[1]}", clock=lambda: next(times), sleep=lambda _: None)
