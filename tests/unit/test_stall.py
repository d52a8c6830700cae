"""How long the devices wait for their host. No JAX, no waiting on time: steps end when the test says so."""

import threading

from launcher.training.stall import Stall, StepClock


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Devices:
    """A step is done when the test ends it."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.steps = StepClock(self.wait_for, self.clock)
        self.stall = Stall(self.steps, self.clock)

    def wait_for(self, done: threading.Event) -> None:
        assert done.wait(20)

    def dispatch(self) -> threading.Event:
        self.stall.dispatching()
        done = threading.Event()
        self.steps.dispatched(done)
        return done

    def end(self, step: threading.Event) -> None:
        """Returns when it is noticed that the devices have nothing to do."""
        step.set()
        while self.steps.idle_since() is None:
            threading.Event().wait(0.001)  # the thread tells nobody


def test_what_the_host_does_while_the_devices_are_busy_is_no_stall() -> None:
    devices = Devices()
    step = devices.dispatch()
    devices.clock.now += 5  # the next batch is made
    devices.dispatch()
    assert devices.stall.seconds == 0.0
    step.set()


def test_devices_that_wait_for_their_batch_stall_from_the_end_of_their_step() -> None:
    devices = Devices()
    devices.clock.now += 2  # the first batch
    step = devices.dispatch()
    assert devices.stall.seconds == 2.0
    devices.clock.now += 3
    devices.end(step)
    devices.clock.now += 4
    devices.dispatch()
    assert devices.stall.seconds == 6.0


def test_time_in_which_the_loop_did_something_else_is_no_stall() -> None:
    devices = Devices()
    step = devices.dispatch()
    devices.end(step)
    devices.clock.now += 30  # a checkpoint
    devices.stall.resume()
    devices.clock.now += 1
    devices.dispatch()
    assert devices.stall.seconds == 1.0


def test_a_step_that_fails_ends_the_watching_and_nothing_else() -> None:
    clock, called = Clock(), threading.Event()

    def fail(_: object) -> None:
        called.set()
        raise RuntimeError("a peer is gone")

    steps = StepClock(fail, clock)
    steps.dispatched(object())
    assert called.wait(20)
    assert steps.idle_since() is None
    steps.close()


def test_a_loop_that_waits_itself_needs_no_thread() -> None:
    clock, before = Clock(), threading.active_count()
    steps = StepClock(None, clock)
    stall = Stall(steps, clock)
    assert threading.active_count() == before
    for _ in range(3):
        clock.now += 0.5  # the batch
        stall.dispatching()
        steps.dispatched(object())
        clock.now += 2
        steps.done()
    assert stall.seconds == 1.5
    steps.close()
