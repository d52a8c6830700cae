"""What befalls slices of which there are several: they come and go on demand, and a fault is its own run's business.

One cluster of two types for all of it: v4-8, of which there may be three, and one v4-16 that is spot. From the second test on a run that
nothing happens to holds one v4-8, and has to go on whatever befalls the others. Where it does not matter what a run does, it counts.
"""

import itertools
import json
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from cluster.config import EMULATED_PROJECT, EMULATED_ZONE, ClusterConfig
from cluster.tpu.api import TpuApi
from cluster.tpu.requests import node_request, queued_request
from launcher.runs import RunState
from tests.chaos.conftest import Account, Cluster, Run
from tests.integration.conftest import eventually, launch_command, make_home

pytestmark = pytest.mark.timeout(900)
MOST = 3
IDLE_S = 30.0
BOOT_GRACE_S = 60
SETTINGS = (
    "cluster.name=fleet",
    "cluster.accelerator_type=v4-8",
    f"cluster.max_slices={MOST}",
    "cluster.node_types={pod: {accelerator_type: v4-16, provisioning: spot}}",
    f"cluster.idle_minutes={IDLE_S / 60}",
    f"cluster.boot_grace={BOOT_GRACE_S}s",
    "cluster.host_grace=5s",
    "cluster.churn_short=1s",
    "cluster.valid_until=6h",
)
COUNT = ("job=script", "job.entrypoint=count.py", f"run.code={Path(__file__).parent / 'programs'}")
POD = "run.slice_type=pod"
PAIR = "cluster.slices=2"
PAGE = 500
"""What the emulated service puts on one page of a list."""


@dataclass(frozen=True)
class Fleet(Cluster):
    """What is asked of the emulated cloud beside what is done to it."""

    def count(self, name: str, *more: str) -> Run:
        """A run that counts until it is told that it is enough, as soon as its command has started."""
        return Run(self.home.run(name), self.home.start(*launch_command(f"run.name={name}", *COUNT, *self.settings, *more)))

    @property
    def endpoint(self) -> dict[str, str]:
        found: dict[str, str] = json.loads((self.home.state / "emulator" / "endpoint.json").read_text())
        return found

    def get(self, collection: str) -> list[dict[str, Any]]:
        """What the service lists in the zone."""
        url = f"{self.endpoint['rest']}/v2/projects/{EMULATED_PROJECT}/locations/{EMULATED_ZONE}/{collection}"
        found: list[dict[str, Any]] = []
        token = ""
        while True:
            with urllib.request.urlopen(f"{url}?pageToken={quote(token)}" if token else url, timeout=30) as answer:
                page = json.loads(answer.read())
            found += page.get(collection, [])
            if not (token := page.get("nextPageToken", "")):
                return found

    def asked(self, verb: str) -> list[str]:
        """The slices that were asked for (`create`) or given back (`delete`), each as often as that was done."""
        done = [one["metadata"] for one in self.get("operations")]
        targets = [one["target"].split("/") for one in done if one["verb"] == verb]
        return sorted(name for *_, kind, name in targets if kind == "queuedResources" and name.startswith("fleet-"))

    def kinds(self, names: list[str]) -> set[tuple[str, bool]]:
        """Accelerator type, and whether it is spot."""
        nodes = {node["name"].rpartition("/")[2]: node for node in self.get("nodes")}
        return {(nodes[name]["acceleratorType"], nodes[name].get("schedulingConfig", {}).get("spot", False)) for name in names}

    @contextmanager
    def fault(self, **rule: Any) -> Iterator[int]:
        """A rule of the emulated cloud; its number."""
        number = self.admin("POST", "/faults", **rule)["id"]
        try:
            yield number
        finally:
            self.admin("DELETE", f"/faults/{number}")

    def wait_struck(self, number: int) -> None:
        eventually(lambda: self.admin("GET", "/faults")[str(number)]["count"] == 0, f"fault {number} has struck as often as it says")

    def wait_listed(self, times: int) -> None:
        """So many listings have begun from now on."""
        rule = {"effect": "latency", "method": "ListQueuedResources", "resource": EMULATED_ZONE}
        with self.fault(**rule, count=times) as number:
            self.wait_struck(number)

    def boot_hangs(self, worker: int) -> Any:
        """The next such host never boots."""
        return self.fault(effect="hang", method="BootHost", resource=f"*/nodes/fleet-*/hosts/{worker}", count=1)


def wait_for_slices(run: Run) -> float:
    """When it did its first step, seconds since the epoch."""
    run.until(lambda: run.first_step(0) is not None, "its first step")
    at = run.first_step(0)
    assert at is not None
    return at


def check_counted(run: Run, attempts: int) -> None:
    """Told that it is enough, it has SUCCEEDED, and no count is missing or was done again."""
    (run.directory.path / "enough").touch()
    run.end()
    check_state(run, RunState.SUCCEEDED, attempts)
    counted = [sorted(run.losses(attempt)) for attempt in range(attempts)]
    assert sorted({step for steps in counted for step in steps}) == list(range(1, counted[-1][-1] + 1))
    for before, after in itertools.pairwise(counted):
        assert after[0] in (before[-1], before[-1] + 1), "killed before it could keep its count, or after"


def check_state(run: Run, state: RunState, attempts: int) -> None:
    status = run.directory.status()
    assert status is not None
    assert (status.state, status.attempt, len(run.events("failure"))) == (state, attempts - 1, attempts - 1), run.events("failure")


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    for home in make_home():
        yield Fleet(home, SETTINGS)


@dataclass(frozen=True)
class Bystander:
    """A run that nothing happens to."""

    run: Run

    @contextmanager
    def goes_on(self) -> Iterator[None]:
        """It counts while the block lasts, and after it."""
        began = self.run.step
        yield
        now = self.run.step
        assert now > began
        self.run.until(lambda: self.run.step > now, "another step")
        check_state(self.run, RunState.RUNNING, attempts=1)


@pytest.fixture(scope="module")
def bystander(fleet: Fleet) -> Iterator[Bystander]:
    run = fleet.count("bystander")
    wait_for_slices(run)
    yield Bystander(run)
    run.directory.request_stop()
    run.process.communicate(timeout=120)
    check_state(run, RunState.STOPPED, attempts=1)


@pytest.mark.long
def test_slices_come_on_demand_never_more_than_may_be_and_go_when_nobody_wants_them(fleet: Fleet, account: Account) -> None:
    asked = time.time()
    runs = [fleet.count(f"demand-{number}") for number in range(MOST + 1)]

    def busy() -> list[Run]:
        for run in runs:
            assert run.process.poll() is None, run.process.communicate()[0]
        return [run for run in runs if run.step > 0]

    eventually(lambda: len(busy()) == MOST, f"{MOST} runs hold a slice")
    account.add(f"{MOST} slices on demand", seen=None, working=time.time() - asked)
    made = fleet.asked("create")
    assert sorted(fleet.slices()) == made
    assert len(set(made)) == len(made) == MOST
    check_nothing_happens_while_listings_fail(fleet)
    assert len(busy()) == MOST

    for run in sorted(runs, key=lambda run: run.step, reverse=True):  # the one that waits comes last
        wait_for_slices(run)
        check_counted(run, attempts=1)
    ended = time.time()
    eventually(lambda: fleet.slices() == [], "no slice is left", limit=IDLE_S + 90)
    account.add(f"idle slices deleted after {IDLE_S:.0f} s", seen=None, working=time.time() - ended)
    assert fleet.asked("create") == made, "the last run took a slice that another one had left"
    assert fleet.asked("delete") == made


def check_nothing_happens_while_listings_fail(fleet: Fleet) -> None:
    """While the list fails, its zone does not answer, and its second page fails, which is the one that our slices are on."""
    before = (fleet.asked("create"), fleet.asked("delete"), sorted(fleet.slices()))

    def same() -> None:
        assert (fleet.asked("create"), fleet.asked("delete"), sorted(fleet.slices())) == before

    refusal = {"effect": "error", "method": "ListQueuedResources", "code": 7, "words": "no"}  # not repeated: one costs a tick
    with fleet.fault(**refusal, count=4) as number:
        fleet.wait_struck(number)
    fleet.wait_listed(2)
    same()
    fleet.admin("POST", "/reachable", zone=EMULATED_ZONE, reachable=False)
    fleet.wait_listed(4)
    fleet.admin("POST", "/reachable", zone=EMULATED_ZONE, reachable=True)
    fleet.wait_listed(2)
    same()
    fill_first_page(fleet)
    with fleet.fault(**refusal, resource="*/pages/*", count=4) as number:
        fleet.wait_struck(number)
    fleet.wait_listed(2)
    same()


def fill_first_page(fleet: Fleet) -> None:
    """With somebody else's queued resources, which wait and whose names come before ours. They stay there."""
    fleet.admin("POST", "/capacity", zone=EMULATED_ZONE, what="v4-32", amount=0)
    config = ClusterConfig(name="aaa", cloud="emulated", accelerator_type="v4-32")
    api = TpuApi(fleet.endpoint["grpc"], EMULATED_PROJECT)
    for name in (f"aaa-{number:03}" for number in range(PAGE)):
        api.create_queued_resource(EMULATED_ZONE, queued_request(config, EMULATED_ZONE, node_request(config, name, {}, {})))
    api.close()


@pytest.mark.long
def test_a_slice_that_waits_four_hours_for_capacity_keeps_its_place_and_serves_its_run(
    fleet: Fleet, bystander: Bystander, account: Account
) -> None:
    def queue() -> list[tuple[str, str, str]]:
        ours = [one for one in fleet.get("queuedResources") if "/fleet-" in one["name"] and one["state"]["state"] != "ACTIVE"]
        return [(one["name"], one["createTime"], one["state"]["state"]) for one in ours]

    fleet.admin("POST", "/capacity", zone=EMULATED_ZONE, what="v4-16", amount=0)
    with bystander.goes_on():
        run = fleet.count("patient", POD)
        eventually(lambda: [state for *_, state in queue()] == ["WAITING_FOR_RESOURCES"], "it waits for capacity")
        before, made = queue(), fleet.asked("create")
        for _ in range(4):
            fleet.admin("POST", "/clock", advance=3600.0)
            fleet.wait_listed(2)
            assert (queue(), fleet.asked("create")) == (before, made)
        assert run.step == 0
        given = time.time()
        fleet.admin("POST", "/capacity", zone=EMULATED_ZONE, what="v4-16", amount=None)
        wait_for_slices(run)
        account.add("capacity after 4 h in the queue", seen=None, working=time.time() - given)
        assert run.slices == [before[0][0].rpartition("/")[2]]
        assert fleet.asked("create") == made
        check_counted(run, attempts=1)


def test_a_preempted_slice_is_the_business_of_its_run_alone(fleet: Fleet, bystander: Bystander, account: Account) -> None:
    with bystander.goes_on():
        run = fleet.count("preempted", POD)
        wait_for_slices(run)
        (before,) = run.slices
        assert fleet.kinds(run.slices) == {("v4-16", True)}
        assert fleet.kinds(bystander.run.slices) == {("v4-8", False)}
        with account.recovery("one of two runs' slices preempted", run, attempt=1):
            fleet.admin("POST", "/preempt", node=before, notice=0)
        check_counted(run, attempts=2)
        assert before not in fleet.slices()


@pytest.mark.long
def test_a_slice_that_lacks_a_host_is_replaced_although_the_api_says_ready(fleet: Fleet, bystander: Bystander, account: Account) -> None:
    """First one that never boots, then one that dies."""
    eventually(lambda: fleet.kinds(fleet.slices()) == {("v4-8", False)}, "a slice that boots is made")
    with bystander.goes_on():
        asked = time.time()
        with fleet.boot_hangs(worker=1) as number:
            run = fleet.count("crippled", POD)
            fleet.wait_struck(number)
        first_step = wait_for_slices(run)
        account.add(f"READY and a host missing, given up after {BOOT_GRACE_S} s", seen=None, working=first_step - asked)
        (before,) = run.slices
        with account.recovery("READY and a host dead", run, attempt=1):
            fleet.admin("POST", "/host", node=before, worker=1, action="kill")
        check_counted(run, attempts=2)
        assert before not in fleet.slices()


@pytest.mark.long
def test_a_run_of_two_slices_outlives_a_boot_without_end_a_preemption_and_a_host_that_hangs(
    fleet: Fleet, bystander: Bystander, account: Account
) -> None:
    with bystander.goes_on():
        asked = time.time()
        with fleet.boot_hangs(worker=0) as number:
            run = fleet.count("pair", PAIR)
            fleet.wait_struck(number)
        first_step = wait_for_slices(run)
        account.add(f"a boot without end, given up after {BOOT_GRACE_S} s", seen=None, working=first_step - asked)

        taken, kept = run.slices
        with account.recovery("one of a run's two slices preempted", run, attempt=1):
            fleet.admin("POST", "/preempt", node=taken, notice=0)
        assert kept in run.slices

        with account.recovery("all processes of a host stopped", run, attempt=2):
            fleet.admin("POST", "/host", node=kept, worker=0, action="hang")
        assert kept not in run.slices
        check_counted(run, attempts=3)
        assert not {taken, kept} & set(fleet.slices())
