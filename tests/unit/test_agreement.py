"""All processes of a program end at the same call of `preempted`, whenever each of them was told. Threads stand for the processes."""

import random
import threading

import pytest

from launcher.training.script import Agreement

LIMIT_S = 30.0


class Service:
    """What JAX's distributed service does here: a store that all see, and a barrier."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self.values: dict[str, str] = {}
        self._barrier = threading.Barrier(processes)

    def client(self, process: int) -> "Client":
        return Client(self, process)


class Client:
    def __init__(self, service: Service, process: int) -> None:
        self._service, self._process = service, process

    def key_value_set(self, key: str, value: str) -> None:
        self._service.values[f"{key.rpartition('/')[0]}/{self._process}"] = value

    def wait_at_barrier(self, name: str, timeout_ms: int) -> None:
        try:
            self._service._barrier.wait(LIMIT_S)
        except threading.BrokenBarrierError as error:
            raise RuntimeError("DEADLINE_EXCEEDED") from error

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return list(self._service.values.items())

    def give_up(self) -> None:
        self._service._barrier.abort()


@pytest.mark.parametrize("seed", range(20))
def test_all_processes_end_at_the_same_call(seed: int) -> None:
    """Each step is a collective: nobody begins it before all have, so a process that were to end alone would leave the others hanging."""
    rng, processes = random.Random(seed), 3
    service, collective = Service(processes), threading.Barrier(processes)
    told = [threading.Event() for _ in range(processes)]
    notice_at, order, delays = rng.randrange(1, 30), rng.sample(range(processes), processes), [rng.random() / 100 for _ in range(processes)]
    noticed = threading.Event()
    ended: list[int] = [0] * processes

    def tell() -> None:
        """The supervisor: one after the other hears of it, whatever they are doing."""
        noticed.wait(LIMIT_S)
        for process, delay in zip(order, delays, strict=True):
            threading.Event().wait(delay)
            told[process].set()

    def train(process: int) -> None:
        agreement = Agreement(service.client(process), told[process].wait)
        for step in range(1, 100_000):
            collective.wait(LIMIT_S)
            if process == 0 and step == notice_at:
                noticed.set()
            if agreement.reached():
                ended[process] = step
                return

    threads = [threading.Thread(target=train, args=(process,), daemon=True) for process in range(processes)]
    threads.append(threading.Thread(target=tell, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert len(set(ended)) == 1, ended
    assert ended[0] >= notice_at


def test_once_reached_it_stays_reached() -> None:
    told = threading.Event()
    agreement = Agreement(Service(1).client(0), told.wait)
    assert not agreement.reached()
    told.set()
    while not agreement.reached():
        pass
    assert agreement.reached()


def test_without_an_answer_of_the_others_the_process_ends_by_itself(capfd: pytest.CaptureFixture[str]) -> None:
    told, client = threading.Event(), Service(2).client(0)
    agreement = Agreement(client, told.wait)
    assert not agreement.reached()
    told.set()
    client.give_up()
    while not agreement.reached():
        pass
    assert "the other processes did not say where they are" in capfd.readouterr().err
