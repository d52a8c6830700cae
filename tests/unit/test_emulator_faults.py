"""Faults and incidents of the emulated cloud, with time in the test's hands."""

import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.api_core import exceptions
from google.cloud import tpu_v2

from cluster.emulator.clock import ManualClock
from cluster.emulator.cloud import Cloud
from cluster.emulator.daemon import purge
from cluster.emulator.embedded import Embedded, embedded_emulator
from cluster.emulator.faults import TPU_PRESETS, Effect, Fault, Faults
from cluster.emulator.guest import GuestAttributes
from cluster.emulator.hosts import NoHosts
from cluster.emulator.metadata import MetadataServer, entries
from cluster.emulator.model import HostRecord, Machine, NodeRecord, Refusal
from cluster.emulator.profile import Profile
from cluster.emulator.store import Store
from cluster.tpu.api import make_client
from cluster.tpu.catalog import lookup

ZONE = "us-central2-b"
PARENT = f"projects/p/locations/{ZONE}"
PATH = f"{PARENT}/nodes/n"


class RecordedHosts(NoHosts):
    """Remembers what was asked of it."""

    def __init__(self) -> None:
        self.running: set[int] = set()
        self.signals: list[tuple[int, int]] = []
        self.notices: dict[str, str] = {}

    def start(self, machine: Machine) -> None:
        self.running |= {host.worker for host in machine.hosts if not host.held}

    def halt(self, machine: Machine) -> None:
        self.running.clear()

    stop = halt

    def signal(self, machine: Machine, host: HostRecord, number: int) -> None:
        self.signals.append((host.worker, number))

    def announce(self, machine: Machine) -> None:
        assert isinstance(machine, NodeRecord)
        self.notices = dict(machine.notices)


@pytest.fixture
def hosts() -> RecordedHosts:
    return RecordedHosts()


@pytest.fixture
def emulator(hosts: RecordedHosts) -> Iterator[Embedded]:
    with embedded_emulator(hosts=hosts, clock=ManualClock(), profile=Profile(notice=30.0, maintenance=60.0)) as running:
        yield running


@pytest.fixture
def cloud(emulator: Embedded) -> Cloud:
    return emulator.cloud


@pytest.fixture
def client(emulator: Embedded) -> Iterator[tpu_v2.TpuClient]:
    made = make_client(emulator.endpoint, "p")
    yield made
    made.transport.close()  # type: ignore[no-untyped-call]


def create(cloud: Cloud, node_id: str = "n") -> Any:
    body = tpu_v2.Node.pb()(accelerator_type="v4-16", runtime_version="tpu-ubuntu2204-base")
    operation = cloud.create_node(PARENT, node_id, body)
    cloud.clock.advance(0)
    return cloud.get_operation(operation.name)


def state(cloud: Cloud) -> str:
    return str(tpu_v2.Node.State(cloud.get_node(PATH).state).name)


def test_rule_strikes_as_often_as_it_says_and_only_what_it_names() -> None:
    faults = Faults()
    number = faults.add(Fault(Effect.ERROR, "Get*", zone="us-*", resource="mine-*", count=2))
    everything = frozenset(Effect)
    assert faults.strike("GetNode", f"{PARENT}/nodes/other", everything) == []
    assert faults.strike("ListNodes", f"{PARENT}/nodes/mine-1", everything) == []
    assert [len(faults.strike("GetNode", f"{PARENT}/nodes/mine-1", everything)) for _ in range(3)] == [1, 1, 0]
    assert faults.rules()[number].count == 0
    assert faults.remove(number)
    assert not faults.remove(number)


def test_probability_with_a_seed_gives_the_same_calls_every_time() -> None:
    def struck(seed: int) -> list[bool]:
        faults = Faults()
        faults.add(Fault(Effect.ERROR, probability=0.5, seed=seed))
        return [bool(faults.strike("GetNode", PATH, frozenset({Effect.ERROR}))) for _ in range(50)]

    assert struck(1) == struck(1) != struck(2)
    assert 10 < sum(struck(1)) < 40


@pytest.mark.parametrize("name", sorted(TPU_PRESETS))
def test_preset_reaches_the_caller_or_ends_the_operation_in_its_words(cloud: Cloud, client: tpu_v2.TpuClient, name: str) -> None:
    cloud.faults.add(TPU_PRESETS[name])
    expected = TPU_PRESETS[name].refusal("CreateNode", PATH)
    if TPU_PRESETS[name].effect is Effect.OPERATION_ERROR:
        error = create(cloud).error
        assert (error.code, error.message) == (expected.code, expected.words)
        cloud.clock.advance(0)
        assert cloud.list_nodes(PARENT) == ([], "")
        return
    node = tpu_v2.Node(accelerator_type="v4-16", runtime_version="tpu-ubuntu2204-base")
    with pytest.raises(exceptions.GoogleAPICallError) as caught:
        client.create_node(parent=PARENT, node_id="n", node=node, timeout=10)
    code = caught.value.grpc_status_code
    assert code is not None
    assert (code.value[0], caught.value.message) == (expected.code, expected.words)
    assert "{" not in expected.words


def test_second_page_of_a_list_can_fail_alone(cloud: Cloud, client: tpu_v2.TpuClient) -> None:
    for name in ("one", "two", "three"):
        create(cloud, name)
    number = cloud.faults.add(Fault(Effect.ERROR, "ListNodes", zone=ZONE, resource="*/pages/*", code=7))
    pages = client.list_nodes(tpu_v2.ListNodesRequest(parent=PARENT, page_size=2), retry=None).pages
    assert [node.name.rpartition("/")[2] for node in next(pages).nodes] == ["one", "three"]
    with pytest.raises(exceptions.PermissionDenied):
        next(pages)
    cloud.faults.remove(number)
    assert len(list(client.list_nodes(tpu_v2.ListNodesRequest(parent=PARENT, page_size=2)))) == 3


def test_broken_connection_before_or_after_the_effect(cloud: Cloud, client: tpu_v2.TpuClient) -> None:
    node = tpu_v2.Node(accelerator_type="v4-16", runtime_version="tpu-ubuntu2204-base")
    for effect, there in ((Effect.DROP, False), (Effect.DROP_ANSWER, True)):
        cloud.faults.add(Fault(effect, "CreateNode", count=1))
        with pytest.raises(exceptions.ServiceUnavailable):
            client.create_node(parent=PARENT, node_id="n", node=node, timeout=10)
        assert bool(cloud.list_nodes(PARENT)[0]) is there


def test_latency_holds_the_answer_until_the_clock_has_moved_on(cloud: Cloud, client: tpu_v2.TpuClient) -> None:
    cloud.faults.add(Fault(Effect.LATENCY, "ListNodes", seconds=5.0, count=1))
    with pytest.raises(exceptions.DeadlineExceeded):
        client.list_nodes(parent=PARENT, timeout=0.2)
    cloud.clock.advance(5.0)
    assert list(client.list_nodes(parent=PARENT, timeout=10)) == []


def test_operation_that_never_ends_keeps_its_node_until_that_is_deleted(cloud: Cloud) -> None:
    cloud.faults.add(Fault(Effect.HANG, "CreateNode"))
    operation = create(cloud)
    cloud.clock.advance(10_000.0)
    assert (state(cloud), cloud.get_operation(operation.name).done) == ("CREATING", False)
    cloud.delete_node(PATH)
    cloud.clock.advance(0)
    assert cloud.list_nodes(PARENT) == ([], "")


def test_deletion_that_fails_leaves_the_node_as_it_was(cloud: Cloud) -> None:
    create(cloud)
    cloud.faults.add(Fault(Effect.OPERATION_ERROR, "DeleteNode", code=13, words="no", count=1))
    operation = cloud.delete_node(PATH)
    cloud.clock.advance(0)
    assert (cloud.get_operation(operation.name).error.code, state(cloud)) == (13, "READY")
    cloud.delete_node(PATH)
    cloud.clock.advance(0)
    assert cloud.list_nodes(PARENT) == ([], "")


def test_queued_resource_whose_creation_fails_is_failed(cloud: Cloud) -> None:
    cloud.faults.add(Fault(Effect.OPERATION_ERROR, "CreateQueuedResource", code=8, words="no {zone}"))
    spec = {"parent": PARENT, "node_id": "n", "node": {"accelerator_type": "v4-16", "runtime_version": "tpu-ubuntu2204-base"}}
    operation = cloud.queued.create(PARENT, "q", tpu_v2.QueuedResource.pb()(tpu={"node_spec": [spec]}))
    cloud.clock.advance(0)
    assert cloud.get_operation(operation.name).error.message == f"no {ZONE}"
    assert cloud.queued.get(f"{PARENT}/queuedResources/q").state.failed_data.error.code == 8


def test_preemption_with_notice_tells_the_hosts_and_takes_them_later(cloud: Cloud, hosts: RecordedHosts) -> None:
    create(cloud)
    cloud.preempt("n")
    cloud.clock.advance(29.0)
    assert (hosts.notices["instance/preempted"], hosts.running, state(cloud)) == ("TRUE", {0, 1}, "READY")
    cloud.clock.advance(1.0)
    assert (hosts.running, state(cloud)) == (set(), "PREEMPTED")
    cloud.delete_node(PATH)
    cloud.clock.advance(0)
    assert cloud.list_nodes(PARENT) == ([], "")


def test_preemption_without_notice_while_creating_fails_the_operation(cloud: Cloud) -> None:
    body = tpu_v2.Node.pb()(accelerator_type="v4-16", runtime_version="tpu-ubuntu2204-base")
    operation = cloud.create_node(PARENT, "n", body)
    cloud.preempt(PATH, notice=0)
    cloud.clock.advance(0)
    assert cloud.get_operation(operation.name).error.code == 3
    assert state(cloud) == "PREEMPTED"


def test_preempted_node_suspends_its_queued_resource_which_needs_force(cloud: Cloud) -> None:
    spec = {"parent": PARENT, "node_id": "n", "node": {"accelerator_type": "v4-16", "runtime_version": "tpu-ubuntu2204-base"}}
    cloud.queued.create(PARENT, "q", tpu_v2.QueuedResource.pb()(tpu={"node_spec": [spec]}))
    cloud.clock.advance(0)
    cloud.preempt("n", notice=0)
    cloud.clock.advance(0)
    path = f"{PARENT}/queuedResources/q"
    assert (cloud.queued.get(path).state.state, state(cloud)) == (8, "PREEMPTED")
    with pytest.raises(Refusal, match="use force"):
        cloud.queued.delete(path)
    cloud.queued.delete(path, force=True)
    cloud.clock.advance(0)
    assert cloud.list_nodes(PARENT) == cloud.queued.list_page(PARENT) == ([], "")


def test_maintenance_is_announced_ends_the_hosts_and_brings_them_back(cloud: Cloud, hosts: RecordedHosts) -> None:
    create(cloud)
    cloud.maintain("n")
    assert hosts.notices == {"instance/maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
    cloud.clock.advance(30.0)
    assert (hosts.running, state(cloud)) == (set(), "REPAIRING")
    cloud.clock.advance(60.0)
    assert (hosts.running, state(cloud)) == ({0, 1}, "READY")


@pytest.mark.parametrize(
    ("act", "seconds", "end"), [("preempt", 30.0, "PREEMPTED"), ("maintain", 30.0, "REPAIRING"), ("maintain", 90.0, "READY")]
)
def test_next_daemon_does_what_the_last_one_announced(tmp_path: Path, act: str, seconds: float, end: str) -> None:
    profile = Profile(notice=30.0, maintenance=60.0)
    store = Store(tmp_path / "cloud.sqlite3")
    first = Cloud(store, NoHosts(), ManualClock(), state_dir=tmp_path, profile=profile)
    create(first)
    getattr(first, act)("n")
    store.close()  # what a SIGKILL leaves: nothing is written at the end
    store = Store(tmp_path / "cloud.sqlite3")
    second = Cloud(store, NoHosts(), ManualClock(), state_dir=tmp_path, profile=profile)
    second.resume()
    assert state(second) == "READY"
    second.clock.advance(seconds)
    assert state(second) == end
    store.close()


class Restarts:
    """A cloud whose daemon can be killed at any time; time goes on meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now, self.hosts = folder, 1_000_000.0, RecordedHosts()
        self.store: Store | None = None
        self.cloud = self.begin()

    def begin(self) -> Cloud:
        if self.store is not None:
            self.now = self.cloud.clock.now()
            self.store.close()  # what a SIGKILL leaves: nothing is written at the end
        self.store = Store(self.folder / "cloud.sqlite3")
        self.cloud = Cloud(self.store, self.hosts, ManualClock(self.now), state_dir=self.folder, profile=Profile(notice=30.0))
        self.cloud.resume()
        return self.cloud


@pytest.fixture
def restarts(tmp_path: Path) -> Iterator[Restarts]:
    made = Restarts(tmp_path)
    yield made
    assert made.store is not None
    made.store.close()


def test_rules_outlive_the_daemon_with_what_is_left_of_them(restarts: Restarts) -> None:
    first = restarts.cloud.faults.add(Fault(Effect.ERROR, "Get*", count=3))
    gone = restarts.cloud.faults.add(Fault(Effect.ERROR))
    assert restarts.cloud.faults.strike("GetNode", PATH, frozenset({Effect.ERROR})) != []
    restarts.cloud.faults.remove(gone)
    faults = restarts.begin().faults
    assert faults.rules() == {first: Fault(Effect.ERROR, "Get*", count=2)}
    assert faults.add(Fault(Effect.DROP)) not in (first, gone), "a number never means another rule"
    faults.clear()
    assert restarts.begin().faults.rules() == {}


def test_chances_go_on_where_the_daemon_ended(restarts: Restarts) -> None:
    def struck(faults: Faults, times: int) -> list[bool]:
        return [bool(faults.strike("GetNode", PATH, frozenset({Effect.ERROR}))) for _ in range(times)]

    rule = Fault(Effect.ERROR, probability=0.5, seed=3)
    whole = Faults()
    whole.add(rule)
    restarts.cloud.faults.add(rule)
    in_parts = [*struck(restarts.cloud.faults, 7), *struck(restarts.begin().faults, 13), *struck(restarts.begin().faults, 20)]
    assert in_parts == struck(whole, 40)


@pytest.mark.parametrize(("effect", "after"), [(Effect.HANG, ("CREATING", False)), (Effect.OPERATION_ERROR, (None, True))])
def test_what_has_struck_an_operation_outlives_the_daemon(restarts: Restarts, effect: Effect, after: tuple[str | None, bool]) -> None:
    restarts.cloud.faults.add(Fault(effect, "CreateNode", code=8, words="no"))
    body = tpu_v2.Node.pb()(accelerator_type="v4-16", runtime_version="tpu-ubuntu2204-base")
    operation = restarts.cloud.create_node(PARENT, "n", body)
    restarts.cloud.faults.clear()
    cloud = restarts.begin()
    cloud.clock.advance(100.0)
    there = state(cloud) if cloud.list_nodes(PARENT)[0] else None
    assert (there, cloud.get_operation(operation.name).done) == after
    assert cloud.get_operation(operation.name).error.code == (8 if there is None else 0)


def test_deletion_that_hangs_goes_on_hanging_until_it_is_asked_for_again(restarts: Restarts) -> None:
    create(restarts.cloud)
    restarts.cloud.faults.add(Fault(Effect.HANG, "DeleteNode", count=1))
    restarts.cloud.delete_node(PATH)
    cloud = restarts.begin()
    cloud.clock.advance(100.0)
    assert state(cloud) == "DELETING"
    cloud.delete_node(PATH)
    cloud.clock.advance(0)
    assert cloud.list_nodes(PARENT) == ([], "")


@pytest.mark.parametrize(("effect", "later"), [(Effect.HANG, {0}), (Effect.LATENCY, {0, 1})])
def test_host_that_is_held_boots_when_it_is_due_although_the_daemon_is_another(restarts: Restarts, effect: Effect, later: set[int]) -> None:
    restarts.cloud.faults.add(Fault(effect, "BootHost", resource="*/hosts/1", seconds=20.0))
    create(restarts.cloud)
    restarts.cloud.clock.advance(10.0)
    cloud = restarts.begin()
    cloud.clock.advance(9.0)
    assert restarts.hosts.running == {0}
    cloud.clock.advance(1.0)
    assert restarts.hosts.running == later


def test_limits_outlive_the_daemon_and_end_with_the_cloud(restarts: Restarts) -> None:
    restarts.cloud.set_capacity(ZONE, "v4-16", 0)
    restarts.cloud.set_quota("us-east5", "v4", 0)
    restarts.cloud.set_reachable("us-east5-a", False)
    restarts.cloud.faults.add(Fault(Effect.ERROR, "GetNode"))
    body = tpu_v2.Node.pb()(accelerator_type="v4-16", runtime_version="tpu-ubuntu2204-base")

    def refusals(cloud: Cloud) -> list[bool]:
        wanted = [cloud.claim(ZONE, body)]
        checks = (lambda: cloud.check_quota([cloud.claim("us-east5-b", body)]), lambda: cloud.check_reachable("us-east5-a"))
        return [not cloud.fits(wanted), *map(refuses, checks), bool(cloud.faults.rules())]

    assert refusals(restarts.cloud) == refusals(restarts.begin()) == [True] * 4
    purge(restarts.folder)
    assert refusals(restarts.begin()) == [False] * 4


def refuses(check: Callable[[], None]) -> bool:
    try:
        check()
    except Refusal:
        return True
    return False


def test_zone_above_its_limit_is_full_only_for_whom_the_limit_concerns(cloud: Cloud) -> None:
    create(cloud)
    cloud.set_capacity(ZONE, "v4-16", 0)
    kinds = {"v4-16": "tpu-ubuntu2204-base", "v4-8": "tpu-ubuntu2204-base"}
    bodies = {name: tpu_v2.Node.pb()(accelerator_type=name, runtime_version=version) for name, version in kinds.items()}
    assert not cloud.fits([cloud.claim(ZONE, bodies["v4-16"])])
    assert cloud.fits([cloud.claim(ZONE, bodies["v4-8"])])
    assert cloud.fits([cloud.claim("us-east5-a", bodies["v4-16"])])


def test_host_that_dies_hangs_or_wakes_leaves_the_node_ready(cloud: Cloud, hosts: RecordedHosts) -> None:
    create(cloud)
    for act in (cloud.kill_host, cloud.hang_host, cloud.wake_host):
        act("n", 1)
    assert hosts.signals == [(1, signal.SIGKILL), (1, signal.SIGSTOP), (1, signal.SIGCONT)]
    assert state(cloud) == "READY"
    with pytest.raises(Refusal, match="hosts/2"):
        cloud.kill_host("n", 2)


@pytest.mark.parametrize(("effect", "later"), [(Effect.HANG, {0}), (Effect.LATENCY, {0, 1})])
def test_host_boots_late_or_never_while_the_node_is_ready(cloud: Cloud, hosts: RecordedHosts, effect: Effect, later: set[int]) -> None:
    cloud.faults.add(Fault(effect, "BootHost", resource="*/hosts/1", seconds=20.0))
    create(cloud)
    assert (state(cloud), hosts.running) == ("READY", {0})
    cloud.clock.advance(20.0)
    assert hosts.running == later
    cloud.faults.clear()
    cloud.boot_host("n", 1)
    cloud.clock.advance(0)
    assert hosts.running == {0, 1}


def test_api_can_show_a_state_that_the_hosts_are_not_in(cloud: Cloud, hosts: RecordedHosts) -> None:
    create(cloud)
    cloud.set_node_state("n", "UNKNOWN")
    assert (state(cloud), hosts.running) == ("UNKNOWN", {0, 1})
    with pytest.raises(Refusal, match="there is no node state 'BROKEN'"):
        cloud.set_node_state("n", "BROKEN")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"preset": "none"}, "no preset 'none'"),
        ({"method": "*"}, "an effect or a preset"),
        ({"effect": "error", "colour": 1}, "has no colour"),
    ],
)
def test_wrong_fault_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Fault.from_dict(values)


def test_waiting_for_a_change_of_metadata_ends_with_the_change(tmp_path: Path) -> None:
    message = tpu_v2.Node.pb()(name=PATH)
    node = NodeRecord(message, "0123456789ab", lookup("v4-8"), [HostRecord(0, "127.99.2.1")])
    server = MetadataServer("127.99.2.1", 0, entries(node, 0), GuestAttributes(tmp_path / "guest.json"))
    url = f"http://127.99.2.1:{server.port}/computeMetadata/v1/instance/preempted"
    etag = ask(url)[1]
    seen: list[str] = []
    waiting = threading.Thread(target=lambda: seen.append(ask(f"{url}?wait_for_change=true&last_etag={etag}")[0]))
    waiting.start()
    node.notices["instance/preempted"] = "TRUE"
    server.show(entries(node, 0))
    waiting.join(10)
    assert seen == ["TRUE"]
    assert ask(f"{url}?wait_for_change=true&timeout_sec=0.05")[0] == "TRUE"
    server.stop()


def ask(url: str) -> tuple[str, str]:
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode(), answer.headers["ETag"]
