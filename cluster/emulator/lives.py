"""The nodes of the emulated cloud and their lives.

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

from cluster.emulator.catalogue import CONFIG_OF_GENERATION
from cluster.emulator.checks import (
    FAILED_PRECONDITION,
    already_exists,
    check_kind,
    check_metadata,
    check_runtime_version,
    not_found,
)
from cluster.emulator.clock import Clock
from cluster.emulator.faults import BOOT_HOST, ON_BOOT, Effect, Faults
from cluster.emulator.hosts import Hosts, new_hosts
from cluster.emulator.instances import Instances
from cluster.emulator.limits import Claim, Limits, stockout
from cluster.emulator.model import HostRecord, NodeRecord, Refusal
from cluster.emulator.operations import Operations
from cluster.emulator.profile import INSTANT, Profile
from cluster.emulator.queued import QueuedResources
from cluster.emulator.secrets import Secrets
from cluster.emulator.store import Store

log = logging.getLogger(__name__)
# google.cloud.tpu.v2.Node.State, Health and ApiVersion
CREATING, READY, DELETING, REPAIRING, STOPPED, STOPPING, STARTING, PREEMPTED = 1, 2, 5, 6, 8, 9, 10, 11
_COMES_UP = frozenset({CREATING, STARTING, REPAIRING})
_HEALTHY = 1
_API_V2 = 4
_CANCELLED, _ABORTED, _INTERNAL = 1, 10, 13
_RETRY_SECONDS = 5.0


class Lives:
    """Nodes and operations, kept in `store`, with hosts from `hosts`. Safe to use from several threads."""

    def __init__(self, store: Store, hosts: Hosts, clock: Clock, *, state_dir: Path, profile: Profile = INSTANT) -> None:
        """`state_dir` sets where the addresses of hosts begin."""
        self._store, self._hosts, self.clock = store, hosts, clock
        self._state_dir, self._profile = state_dir, profile
        self._lock = threading.RLock()
        self._working: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._nodes: dict[str, NodeRecord] = {}
        self._members: defaultdict[str, dict[str, NodeRecord]] = defaultdict(dict)
        for node in store.nodes():
            self._keep(node)
        self._limits = Limits(store)
        self.faults = Faults(store, self._lock)
        self._operations = Operations(store, clock, self.faults)
        self.secrets = Secrets(store, clock, self._lock)
        self.instances = Instances(store, hosts, clock, self.faults, self._lock, state_dir=state_dir, profile=profile)
        self.queued = QueuedResources(self, self._operations, store, clock, profile, self._lock)

    def resume(self) -> None:
        """Take up what an earlier daemon left: its hosts are found again, its unfinished work is done. Call once, before serving."""
        work = {CREATING: self._boot_again, STARTING: self._boot_again, DELETING: self._tear_down, STOPPING: self._power_off}
        with self._lock:
            nodes = list(self._nodes.values())
        for node in nodes:
            for host in node.hosts:
                if host.held and host.boots_at is not None:
                    self.clock.after(max(0.0, host.boots_at - self.clock.now()), functools.partial(self._boot, node, host))
            if node.message.state in (DELETING, STOPPING) and self._operations.hangs(node.operation):
                continue
            if node.message.state in work:
                self.clock.after(0.0, functools.partial(work[node.message.state], node))
            elif node.message.state not in (STOPPED, PREEMPTED, REPAIRING):
                self._find_hosts(node)
        self.queued.resume()
        self.instances.resume()

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
        return self._limits.fits(wanted, lambda: self._claims(lambda node: node.holds))

    def make(self, path: str, body: Any) -> None:
        self._begin(path, body, operation="", holds=True)

    def members(self, queued: str) -> list[NodeRecord]:
        return list(self._members[queued].values()) if queued in self._members else []

    def end(self, path: str) -> None:
        """Begin the deletion of a node, unless it is under way; one that a fault holds up is begun anew (a guess). Raises Refusal."""
        node = self._find(path)
        if node.message.state != DELETING or self._operations.stuck(node.operation):
            self._operations.fail(node.operation, _ABORTED, "The node was deleted while it was being created.")  # a guess
            self._begin_deletion(node)

    def watch_hosts(self) -> None:
        """Write down which startup scripts have ended since the last time. As on the real cloud their nodes stay READY."""
        self.instances.watch()
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
        node.message.accelerator_config.type_ = CONFIG_OF_GENERATION[kind.generation]
        node.hosts = new_hosts(self._store, self._state_dir, kind.hosts)
        self._keep(node)
        self._store.put_node(node)
        self.clock.after(self._profile.create, lambda: self._bring_up(node))

    def _keep(self, node: NodeRecord) -> None:
        self._nodes[node.path] = node
        if node.queued:
            self._members[node.queued][node.path] = node

    def _turn(self, path: str, before: int, after: int, verb: str, delay: float, work: Callable[[NodeRecord], None]) -> Any:
        """Begin to stop or start a node."""
        with self._lock, self._store.together():
            node = self._find(path)
            if node.message.state != before:
                words = f"Cloud TPU received a bad request. {verb} is not supported while in state {self.state_name(node)} [EID: 0xe42f]"
                raise Refusal(FAILED_PRECONDITION, words)
            operation = self._operations.begin(node.parent, path, verb)
            node.operation = operation.name
            doom = self._operations.doom(operation.name)
            if doom is not None:
                self._operations.fail(operation.name, doom.code, doom.words)
            else:
                self._settle(node, after)
            if doom is None and not self._operations.hangs(operation.name):
                self.clock.after(delay, lambda: work(node))
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
            if before not in _COMES_UP or not self._is(node, before) or not self._may_come_up(node):
                return
            self._hold_hosts(node)
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

    def _may_come_up(self, node: NodeRecord) -> bool:
        """Whether nothing is in its way; a fault that lets its operation fail is the end of it."""
        if self._operations.hangs(node.operation):
            return False
        with self._lock:
            doom = self._operations.doom(node.operation)
            if doom is not None:
                self._give_up(node, node.message.state, doom)
                return False
        return self._take_capacity(node)

    def _hold_hosts(self, node: NodeRecord) -> None:
        """Keep from booting what a fault keeps from it, for a while or for ever."""
        for host in node.hosts:
            for fault in self.faults.strike(BOOT_HOST, f"{node.path}/hosts/{host.worker}", ON_BOOT)[:1]:
                host.held, host.boots_at = True, None
                if fault.effect is Effect.LATENCY:
                    host.boots_at = self.clock.now() + fault.seconds
                    self.clock.after(fault.seconds, functools.partial(self._boot, node, host))

    def _boot(self, node: NodeRecord, host: HostRecord) -> None:
        """Boot one host, again or at last."""
        with self._working[node.uid]:
            if self._is(node, READY):
                host.held, host.boots_at, host.exited = False, None, False
                self._find_hosts(node)

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
        doom = self._operations.doom(node.operation)
        if doom is not None:
            self._operations.fail(node.operation, doom.code, doom.words)
            return
        self._settle(node, DELETING)
        if not self._operations.hangs(node.operation):
            self.clock.after(self._profile.delete, lambda: self._tear_down(node))

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
                self.clock.after(_RETRY_SECONDS, lambda: again(node))
                return False
            return True

    def _forget(self, node: NodeRecord) -> None:
        from google.protobuf import empty_pb2

        del self._nodes[node.path]
        if node.queued:
            del self._members[node.queued][node.path]
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

    @staticmethod
    def state_name(node: NodeRecord) -> str:
        return str(type(node.message).DESCRIPTOR.fields_by_name["state"].enum_type.values_by_number[node.message.state].name)

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
        message.create_time.FromNanoseconds(int(self.clock.now() * 1e9))
        del message.network_endpoints[:]
        return message


def _claim(node: NodeRecord) -> Claim:
    return Claim(node.zone, node.kind, node.message.scheduling_config.spot or node.message.scheduling_config.preemptible)


_HOLDS_NOTHING = frozenset({STOPPED, PREEMPTED})
