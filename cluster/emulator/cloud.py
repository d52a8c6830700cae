"""The emulated cloud itself: nodes and their lives, and what makes them. Knows no gRPC.

    create_node -> CREATING -> (hosts start) -> READY -> DELETING -> (hosts end) -> no node
                                                READY -> STOPPING -> (hosts end) -> STOPPED -> STARTING -> (hosts start) -> READY
                                                READY -> PREEMPTED (the hosts end; the node stays until somebody deletes it)

Everything that changes a message happens under one lock. Starting and ending hosts takes time and happens outside it, under a lock of the
node's own, so that a deletion waits for a start under way and a start never revives what was deleted meanwhile.
"""

import copy
import functools
import logging
import secrets
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cluster.emulator.checks import (
    FAILED_PRECONDITION,
    already_exists,
    check_kind,
    check_metadata,
    check_parent,
    check_resource_id,
    check_runtime_version,
    check_update,
    not_found,
)
from cluster.emulator.clock import Clock
from cluster.emulator.hosts import Hosts, address
from cluster.emulator.limits import Claim, Limits, stockout
from cluster.emulator.model import HostRecord, NodeRecord, Refusal
from cluster.emulator.operations import Operations
from cluster.emulator.paging import page
from cluster.emulator.profile import INSTANT, Profile
from cluster.emulator.queued import QueuedResources
from cluster.emulator.store import Store

log = logging.getLogger(__name__)
# google.cloud.tpu.v2.Node.State, Health and ApiVersion
CREATING, READY, DELETING, STOPPED, STOPPING, STARTING, PREEMPTED = 1, 2, 5, 8, 9, 10, 11
_HEALTHY = 1
_API_V2 = 4
_CANCELLED, _ABORTED, _INTERNAL = 1, 10, 13
_RETRY_SECONDS = 5.0


class Cloud:
    """Nodes and operations, kept in `store`, with hosts from `hosts`. Safe to use from several threads."""

    def __init__(self, store: Store, hosts: Hosts, clock: Clock, *, state_dir: Path, profile: Profile = INSTANT) -> None:
        """`state_dir` sets where the addresses of hosts begin."""
        self._store, self._hosts, self._clock = store, hosts, clock
        self._state_dir, self._profile = state_dir, profile
        self._lock = threading.RLock()
        self._working: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._nodes = {node.path: node for node in store.nodes()}
        self._operations = Operations(store, clock)
        self._limits = Limits(store)
        self.queued = QueuedResources(self, self._operations, store, clock, profile, self._lock)

    def resume(self) -> None:
        """Take up what an earlier daemon left: its hosts are found again, its unfinished work is done. Call once, before serving."""
        work = {CREATING: self._boot_again, STARTING: self._boot_again, DELETING: self._tear_down, STOPPING: self._power_off}
        with self._lock:
            nodes = list(self._nodes.values())
        for node in nodes:
            if node.message.state in work:
                self._clock.after(0.0, functools.partial(work[node.message.state], node))
            elif node.message.state not in (STOPPED, PREEMPTED):
                self._find_hosts(node)
        self.queued.resume()

    # ---- nodes

    def create_node(self, parent: str, node_id: str, body: Any) -> Any:
        """Accept a raw Node and return the operation. Raises Refusal."""
        zone = check_parent(parent)
        check_resource_id("nodeId", node_id)
        wanted = [self.claim(zone, body)]
        path = f"{parent}/nodes/{node_id}"
        with self._lock, self._store.together():
            self.check_free(path)
            self.check_quota(wanted)
            operation = self._operations.begin(parent, path, "create")
            self._begin(path, body, operation.name, holds=self.fits(wanted))
            return copy.deepcopy(operation)

    def get_node(self, path: str) -> Any:
        """Raises Refusal."""
        with self._lock:
            return copy.deepcopy(self._find(path).message)

    def list_nodes(self, parent: str, page_size: int = 0, page_token: str = "") -> tuple[list[bytes], str]:
        """Serialized Nodes of a zone (or of all, with zone `-`), and the token of the next page. Raises Refusal."""
        with self._lock:
            paths, token = page(self.reachable(self._nodes), parent, "nodes", page_size, page_token)
            return [self._nodes[path].message.SerializeToString() for path in paths], token

    def delete_node(self, path: str) -> Any:
        """Return the operation that deletes it; the one under way when it is being deleted already (a guess). Raises Refusal."""
        with self._lock, self._store.together():
            node = self._find(path)
            if node.message.state != DELETING:
                self._operations.fail(node.operation, _ABORTED, "The node was deleted while it was being created.")  # a guess
                self._begin_deletion(node)
            return copy.deepcopy(self._operations.get(node.operation))

    def stop_node(self, path: str) -> Any:
        """Raises Refusal."""
        return self._turn(path, READY, STOPPING, "stop", self._profile.delete, self._power_off)

    def start_node(self, path: str) -> Any:
        """Raises Refusal. A spot node cannot be started again (docs: "Manage TPU Spot VMs"); the words are a guess."""
        with self._lock:
            if self._find(path).message.scheduling_config.spot:
                raise Refusal(
                    FAILED_PRECONDITION, f"Cloud TPU received a bad request. Spot node '{path}' cannot be started again. [EID: 0xe430]"
                )
            return self._turn(path, STOPPED, STARTING, "start", self._profile.create, self._bring_up)

    def update_node(self, body: Any, fields: list[str]) -> Any:
        """Change description, tags, labels, metadata or data_disks, and return the operation, which has ended. Raises Refusal."""
        check_update(fields)
        with self._lock, self._store.together():
            node = self._find(body.name)
            for name in fields:
                node.message.ClearField(name)
            changes = copy.deepcopy(body)
            for field, _ in body.ListFields():
                if field.name not in fields:
                    changes.ClearField(field.name)
            node.message.MergeFrom(changes)
            self._hosts.announce(node)
            operation = self._operations.begin(node.parent, node.path, "update")
            self._operations.succeed(operation.name, node.message)
            self._store.put_node(node)
            return copy.deepcopy(operation)

    # ---- operations

    def get_operation(self, name: str) -> Any:
        """Raises Refusal."""
        with self._lock:
            return copy.deepcopy(self._operations.get(name))

    def list_operations(self, parent: str) -> list[Any]:
        with self._lock:
            return copy.deepcopy(self._operations.list(parent))

    def delete_operation(self, name: str) -> None:
        """Forget an operation; what it does goes on. Raises Refusal."""
        with self._lock:
            self._operations.forget(name)

    def cancel_operation(self, name: str) -> None:
        """A creation that is cancelled leaves nothing; other operations take no notice (a guess). Raises Refusal."""
        with self._lock, self._store.together():
            self._operations.get(name)
            if self.queued.cancel(name):
                return
            for node in self._nodes.values():
                if node.operation == name and node.message.state == CREATING:
                    self._operations.fail(name, _CANCELLED, "The operation was cancelled.")
                    self._begin_deletion(node)

    # ---- limits

    def set_capacity(self, zone: str, what: str, amount: int | None) -> None:
        """What the zone can hold in all. `what`: an accelerator type (`amount` counts slices), a generation or `*` (it counts chips).

        None: without limit again. What is held already stays.
        """
        with self._lock:
            self._limits.set_capacity(zone, what, amount)
            self.queued.look()

    def set_quota(self, place: str, generation: str, amount: int | None, *, spot: bool = False) -> None:
        """`place`: a zone or a region. `amount` in the unit of the generation's type names: TensorCores, or chips for v5e and v6e."""
        with self._lock:
            self._limits.set_quota(place, generation, amount, spot=spot)

    def set_reachable(self, zone: str, reachable: bool) -> None:
        """A zone that is not reachable is named in lists' `unreachable`, and every other call there fails with UNAVAILABLE."""
        with self._lock:
            self._limits.set_reachable(zone, reachable)

    def check_reachable(self, zone: str) -> None:
        """Raises Refusal."""
        with self._lock:
            self._limits.check_reachable(zone)

    def unreachable(self, parent: str) -> list[str]:
        """The locations that a list of `parent` has to do without."""
        zone = check_parent(parent, wildcard=True)
        with self._lock:
            return [f"{parent.rpartition('/')[0]}/{down}" for down in self._limits.unreachable() if zone in (down, "-")]

    # ---- for queued resources

    def claim(self, zone: str, body: Any) -> Claim:
        """What a raw Node asks for, checked. Raises Refusal."""
        kind = check_kind(body, zone)
        check_runtime_version(body.runtime_version)
        check_metadata(body.metadata)
        return Claim(zone, kind, body.scheduling_config.spot or body.scheduling_config.preemptible)

    def check_free(self, path: str) -> None:
        """Raises Refusal."""
        if path in self._nodes:
            raise already_exists(path)

    def check_quota(self, wanted: list[Claim]) -> None:
        """Raises Refusal."""
        self._limits.check_quota(wanted, lambda: [*self._claims(lambda node: not node.queued), *self.queued.claims()])

    def fits(self, wanted: list[Claim]) -> bool:
        return self._limits.fits(wanted, self._claims(lambda node: node.holds))

    def make(self, path: str, body: Any) -> None:
        self._begin(path, body, operation="", holds=True)

    def members(self, queued: str) -> list[NodeRecord]:
        return [node for node in self._nodes.values() if node.queued == queued]

    def end(self, path: str) -> None:
        self.delete_node(path)

    # ---- lives of nodes

    def watch_hosts(self) -> None:
        """Write down which startup scripts have ended since the last time. As on the real cloud their nodes stay READY."""
        with self._lock:
            for node in self._nodes.values():
                ended = [host for host in node.hosts if not host.exited and node.message.state == READY and self._hosts.exited(host)]
                for host in ended:
                    host.exited = True
                    log.warning("host %s-w-%d at %s: its startup script has ended", node.node_id, host.worker, host.ip)
                if ended:
                    self._store.put_node(node)

    def _begin(self, path: str, body: Any, operation: str, *, holds: bool) -> None:
        kind = check_kind(body, path.split("/")[3])
        node = NodeRecord(self._new_message(path, body), secrets.token_hex(6), kind, operation=operation, holds=holds)
        node.message.accelerator_type = kind.name
        node.message.accelerator_config.topology = kind.topology
        node.message.accelerator_config.type_ = _CONFIG_OF_GENERATION[kind.generation]
        node.hosts = self._new_hosts(kind.hosts)
        self._nodes[path] = node
        self._store.put_node(node)
        self._clock.after(self._profile.create, lambda: self._bring_up(node))

    def _turn(self, path: str, before: int, after: int, verb: str, delay: float, work: Callable[[NodeRecord], None]) -> Any:
        """Begin to stop or start a node."""
        with self._lock, self._store.together():
            node = self._find(path)
            if node.message.state != before:
                words = f"Cloud TPU received a bad request. {verb} is not supported while in state {_name(node)} [EID: 0xe42f]"
                raise Refusal(FAILED_PRECONDITION, words)
            operation = self._operations.begin(node.parent, path, verb)
            node.operation = operation.name
            self._settle(node, after)
            self._clock.after(delay, lambda: work(node))
            return copy.deepcopy(operation)

    def _find_hosts(self, node: NodeRecord) -> None:
        try:
            self._hosts.start(node)
        except OSError as error:  # one node without hosts must not keep the others from being served
            log.error("hosts of node %s cannot be found again: %s", node.path, error)
        with self._lock:
            self._store.put_node(node)

    def _boot_again(self, node: NodeRecord) -> None:
        self._hosts.halt(node)  # some hosts may have started and not been written down
        self._bring_up(node)

    def _bring_up(self, node: NodeRecord) -> None:
        with self._working[node.uid]:
            before = node.message.state
            if before not in (CREATING, STARTING) or not self._is(node, before) or not self._take_capacity(node):
                return
            try:
                self._hosts.start(node)
            except OSError as error:
                log.error("node %s has no hosts: %s", node.path, error)
                self._give_up(node, before, Refusal(_INTERNAL, "an internal error has occurred"))
                return
            with self._lock, self._store.together():
                if not self._is(node, before):
                    return  # it is being deleted; that work waits for ours and ends the hosts
                node.message.health = _HEALTHY
                del node.message.network_endpoints[:]
                for host in node.hosts:
                    node.message.network_endpoints.add(ip_address=host.ip, port=8470)
                self._settle(node, READY)
                self._operations.succeed(node.operation, node.message)

    def _take_capacity(self, node: NodeRecord) -> bool:
        """Whether there is capacity for it; if not, that is the end of its operation."""
        with self._lock:
            if not node.holds:
                node.holds = self.fits([_claim(node)])
            if not node.holds:
                self._give_up(node, node.message.state, stockout(node.zone))
            return node.holds

    def _give_up(self, node: NodeRecord, state: int, reason: Refusal) -> None:
        """It does not come up: a new node goes, a stopped one stays STOPPED."""
        with self._lock, self._store.together():
            self._operations.fail(node.operation, reason.code, reason.words)
            if self._is(node, CREATING):
                self._begin_deletion(node)
            elif self._is(node, state):
                self._settle(node, STOPPED)

    def _begin_deletion(self, node: NodeRecord) -> None:
        node.operation = self._operations.begin(node.parent, node.path, "delete").name
        self._settle(node, DELETING)
        self._clock.after(self._profile.delete, lambda: self._tear_down(node))

    def _tear_down(self, node: NodeRecord) -> None:
        if self._end_hosts(node, DELETING, self._hosts.stop, self._tear_down):
            with self._lock, self._store.together():
                self._forget(node)

    def _power_off(self, node: NodeRecord) -> None:
        if self._end_hosts(node, STOPPING, self._hosts.halt, self._power_off):
            with self._lock, self._store.together():
                for host in node.hosts:
                    host.process, host.exited = None, False
                self._settle(node, STOPPED)
                self._operations.succeed(node.operation, node.message)

    def _end_hosts(self, node: NodeRecord, state: int, end: Callable[[NodeRecord], None], again: Callable[[NodeRecord], None]) -> bool:
        """Whether the node is still in `state` and its hosts have ended; if they do not end, it is tried `again` later."""
        with self._working[node.uid]:
            if not self._is(node, state):
                return False
            try:
                end(node)
            except TimeoutError as error:
                log.error("hosts of node %s have not ended yet: %s", node.path, error)
                self._clock.after(_RETRY_SECONDS, lambda: again(node))
                return False
            return True

    def _forget(self, node: NodeRecord) -> None:
        from google.protobuf import empty_pb2

        del self._nodes[node.path]
        self._working.pop(node.uid, None)
        self._store.remove_node(node.path)
        self._operations.succeed(node.operation, empty_pb2.Empty())
        self._changed(node)

    def _settle(self, node: NodeRecord, state: int) -> None:
        """The node is in `state` from now on. Under the lock."""
        node.message.state = state
        if state in _HOLDS_NOTHING:
            node.holds = False
        self._store.put_node(node)
        self._changed(node)

    def _changed(self, node: NodeRecord) -> None:
        """Let queued resources see it: the one it belongs to, and those that wait for what it may have given back."""
        if node.queued:
            self.queued.look(node.queued)
        if not node.holds or node.path not in self._nodes:
            self.queued.look()

    def _claims(self, counts: Callable[[NodeRecord], bool]) -> list[Claim]:
        return [_claim(node) for node in self._nodes.values() if counts(node)]

    def reachable(self, paths: Iterable[str]) -> list[str]:
        """Those of resources that a list can show now."""
        down = set(self._limits.unreachable())
        return [path for path in paths if path.split("/")[3] not in down]

    def _is(self, node: NodeRecord, state: int) -> bool:
        """Whether `node` is still there, itself and not a later one of its name, and in `state`."""
        with self._lock:
            return self._nodes.get(node.path) is node and node.message.state == state

    def _find(self, path: str) -> NodeRecord:
        if path not in self._nodes:
            raise not_found(path)
        return self._nodes[path]

    def _new_message(self, path: str, body: Any) -> Any:
        message = copy.deepcopy(body)
        message.name, message.state, message.api_version = path, CREATING, _API_V2
        message.id = secrets.randbits(62)
        message.create_time.FromNanoseconds(int(self._clock.now() * 1e9))
        del message.network_endpoints[:]
        return message

    def _new_hosts(self, count: int) -> list[HostRecord]:
        """Hosts with addresses that no earlier node had, as far as the loopback network reaches."""
        index = int(self._store.get("next_index", "0"))
        self._store.set("next_index", str(index + -(-count // 254)))
        return [HostRecord(worker, address(self._state_dir, index, worker)) for worker in range(count)]


def _claim(node: NodeRecord) -> Claim:
    return Claim(node.zone, node.kind, node.message.scheduling_config.spot or node.message.scheduling_config.preemptible)


def _name(node: NodeRecord) -> str:
    return str(type(node.message).DESCRIPTOR.fields_by_name["state"].enum_type.values_by_number[node.message.state].name)


_HOLDS_NOTHING = frozenset({STOPPED, PREEMPTED})
_CONFIG_OF_GENERATION = {"v2": 2, "v3": 4, "v4": 7, "v5e": 9, "v5p": 10, "v6e": 11}
