"""The emulated cloud itself: nodes and their lives. Knows no gRPC.

    create_node -> CREATING -> (hosts start) -> READY -> DELETING -> (hosts end) -> no node

Everything that changes a message happens under one lock. Starting and ending hosts takes time and happens outside it, under a lock of the
node's own, so that a deletion waits for a start under way and a start never revives what was deleted meanwhile.
"""

import copy
import functools
import logging
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.emulator.checks import (
    INVALID_ARGUMENT,
    already_exists,
    check_kind,
    check_metadata,
    check_node_id,
    check_parent,
    check_runtime_version,
    not_found,
)
from cluster.emulator.hosts import Hosts, address
from cluster.emulator.model import HostRecord, NodeRecord, Refusal
from cluster.emulator.operations import Operations
from cluster.emulator.store import Store
from cluster.emulator.timers import INSTANT, Profile, Timers

log = logging.getLogger(__name__)
# google.cloud.tpu.v2.Node.State, Health and ApiVersion
CREATING, READY, DELETING = 1, 2, 5
_HEALTHY = 1
_API_V2 = 4
_CANCELLED, _ABORTED, _INTERNAL = 1, 10, 13
_PAGE = 500
_RETRY_SECONDS = 5.0


class Cloud:
    """Nodes and operations, kept in `store`, with hosts from `hosts`. Safe to use from several threads."""

    def __init__(
        self,
        store: Store,
        hosts: Hosts,
        timers: Timers,
        *,
        state_dir: Path,
        profile: Profile = INSTANT,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`state_dir` sets where the addresses of hosts begin. `clock`: seconds since the epoch."""
        self._store, self._hosts, self._timers = store, hosts, timers
        self._state_dir, self._profile, self._clock = state_dir, profile, clock
        self._lock = threading.RLock()
        self._working: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._nodes = {node.path: node for node in store.nodes()}
        self._operations = Operations(store, clock)

    def resume(self) -> None:
        """Take up what an earlier daemon left: its hosts are found again, its unfinished work is done. Call once, before serving."""
        with self._lock:
            nodes = list(self._nodes.values())
        for node in nodes:
            if node.message.state == CREATING:
                self._hosts.stop(node)  # some hosts may have started and not been written down
                self._timers.after(0.0, functools.partial(self._bring_up, node))
            elif node.message.state == DELETING:
                self._timers.after(0.0, functools.partial(self._tear_down, node))
            else:
                self._find_hosts(node)

    def create_node(self, parent: str, node_id: str, body: Any) -> Any:
        """Accept a raw Node and return the operation. Raises Refusal."""
        zone = check_parent(parent)
        check_node_id(node_id)
        kind = check_kind(body, zone)
        check_runtime_version(body.runtime_version)
        check_metadata(body.metadata)
        path = f"{parent}/nodes/{node_id}"
        with self._lock:
            if path in self._nodes:
                raise already_exists(path)
            node = NodeRecord(self._new_message(path, body), secrets.token_hex(6), kind)
            node.message.accelerator_type = kind.name
            node.message.accelerator_config.topology = kind.topology
            node.message.accelerator_config.type_ = _CONFIG_OF_GENERATION[kind.generation]
            node.hosts = self._new_hosts(kind.hosts)
            operation = self._operations.begin(parent, path, "create")
            node.operation = operation.name
            self._nodes[path] = node
            self._store.put_node(node)
            self._timers.after(self._profile.create, lambda: self._bring_up(node))
            return copy.deepcopy(operation)

    def get_node(self, path: str) -> Any:
        """Raises Refusal."""
        with self._lock:
            return copy.deepcopy(self._find(path).message)

    def list_nodes(self, parent: str, page_size: int = 0, page_token: str = "") -> tuple[list[bytes], str]:
        """Serialized Nodes of a zone (or of all, with zone `-`), and the token of the next page. Raises Refusal."""
        zone = check_parent(parent, wildcard=True)
        prefix = f"{parent}/nodes/" if zone != "-" else f"{parent.rpartition('/')[0]}/"
        if page_size < 0 or (page_token and not page_token.startswith(prefix)):
            raise Refusal(INVALID_ARGUMENT, "Cloud TPU received an invalid argument. The page size or token is not valid.")  # a guess
        with self._lock:
            paths = sorted(path for path in self._nodes if path.startswith(prefix) and path > page_token)
            size = min(page_size or _PAGE, _PAGE)
            page = [self._nodes[path].message.SerializeToString() for path in paths[:size]]
            return page, paths[size - 1] if len(paths) > size else ""

    def delete_node(self, path: str) -> Any:
        """Return the operation that deletes it; the one under way when it is being deleted already (a guess). Raises Refusal."""
        with self._lock:
            node = self._find(path)
            if node.message.state != DELETING:
                self._operations.fail(node.operation, _ABORTED, "The node was deleted while it was being created.")  # a guess
                self._begin_deletion(node)
            return copy.deepcopy(self._operations.get(node.operation))

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
        """A creation that is cancelled leaves no node; other operations take no notice (a guess). Raises Refusal."""
        with self._lock:
            self._operations.get(name)
            for node in self._nodes.values():
                if node.operation == name and node.message.state == CREATING:
                    self._operations.fail(name, _CANCELLED, "The operation was cancelled.")
                    self._begin_deletion(node)

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

    def _find_hosts(self, node: NodeRecord) -> None:
        try:
            self._hosts.start(node)
        except OSError as error:  # one node without hosts must not keep the others from being served
            log.error("hosts of node %s cannot be found again: %s", node.path, error)
        with self._lock:
            self._store.put_node(node)

    def _bring_up(self, node: NodeRecord) -> None:
        with self._working[node.uid]:
            if not self._is(node, CREATING):
                return
            try:
                self._hosts.start(node)
            except OSError as error:
                log.error("node %s has no hosts: %s", node.path, error)
                with self._lock:
                    self._operations.fail(node.operation, _INTERNAL, "an internal error has occurred")
                    if self._is(node, CREATING):
                        self._begin_deletion(node)
                return
            with self._lock:
                if not self._is(node, CREATING):
                    return  # it is being deleted; that work waits for ours and ends the hosts
                node.message.state, node.message.health = READY, _HEALTHY
                for host in node.hosts:
                    node.message.network_endpoints.add(ip_address=host.ip, port=8470)
                self._store.put_node(node)
                self._operations.succeed(node.operation, node.message)

    def _begin_deletion(self, node: NodeRecord) -> None:
        parent = node.path.rpartition("/nodes/")[0]
        node.message.state = DELETING
        node.operation = self._operations.begin(parent, node.path, "delete").name
        self._store.put_node(node)
        self._timers.after(self._profile.delete, lambda: self._tear_down(node))

    def _tear_down(self, node: NodeRecord) -> None:
        from google.protobuf import empty_pb2

        with self._working[node.uid]:
            if not self._is(node, DELETING):
                return
            try:
                self._hosts.stop(node)
            except TimeoutError as error:
                log.error("node %s is not gone yet: %s", node.path, error)
                self._timers.after(_RETRY_SECONDS, lambda: self._tear_down(node))
                return
            with self._lock:
                del self._nodes[node.path]
                self._store.remove_node(node.path)
                self._operations.succeed(node.operation, empty_pb2.Empty())
        del self._working[node.uid]

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
        message.create_time.FromNanoseconds(int(self._clock() * 1e9))
        del message.network_endpoints[:]
        return message

    def _new_hosts(self, count: int) -> list[HostRecord]:
        """Hosts with addresses that no earlier node had, as far as the loopback network reaches."""
        index = int(self._store.get("next_index", "0"))
        self._store.set("next_index", str(index + -(-count // 254)))
        return [HostRecord(worker, address(self._state_dir, index, worker)) for worker in range(count)]


_CONFIG_OF_GENERATION = {"v2": 2, "v3": 4, "v4": 7, "v5e": 9, "v5p": 10, "v6e": 11}
