"""What can be asked of the emulated cloud: the API's methods, and the rules that a test or a user sets. Knows no gRPC."""

import copy
from typing import Any

from cluster.emulator.checks import FAILED_PRECONDITION, INVALID_ARGUMENT, check_parent, check_resource_id, check_update
from cluster.emulator.incidents import Incidents
from cluster.emulator.lives import CREATING, DELETING, PREEMPTED, READY, STARTING, STOPPED, STOPPING
from cluster.emulator.model import Refusal
from cluster.emulator.paging import page

__all__ = ["CREATING", "DELETING", "PREEMPTED", "READY", "STARTING", "STOPPED", "STOPPING", "Cloud"]
_CANCELLED = 1


class Cloud(Incidents):
    """Nodes, queued resources (`queued`), operations, limits and `faults`. Safe to use from several threads."""

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

    def guest_attributes(self, path: str, query: str, workers: list[str]) -> list[dict[str, str]]:
        """What the hosts of a node have published: `namespace/key` -> value, a dict for each of `workers` (ids; none: all), in their order.

        `query`: `namespace/`, `namespace/key` or empty for all. Raises Refusal, also when nothing is found.
        """
        with self._lock:
            node = self._find(path)
            asked = [host for host in node.hosts if not workers or str(host.worker) in workers]
            values = [self._hosts.guest_attributes(node, host) for host in asked]
        matches = [{name: value for name, value in one.items() if _answers(name, query)} for one in values]
        if not any(matches):
            raise Refusal(INVALID_ARGUMENT, f'Cloud TPU received an invalid argument. The "GuestAttributes" value "{query}" was not found.')
        return matches

    def list_nodes(self, parent: str, page_size: int = 0, page_token: str = "") -> tuple[list[bytes], str]:
        """Serialized Nodes of a zone (or of all, with zone `-`), and the token of the next page. Raises Refusal."""
        with self._lock:
            paths, token = page(self.reachable(self._nodes), parent, "nodes", page_size, page_token)
            return [self._nodes[path].message.SerializeToString() for path in paths], token

    def describe(self) -> list[dict[str, Any]]:
        """Every node with what is behind it, for people and tests."""
        with self._lock:
            return [
                {
                    "name": node.path,
                    "state": self.state_name(node),
                    "queuedResource": node.queued,
                    "hosts": [{"worker": host.worker, "ip": host.ip, "exited": host.exited, "held": host.held} for host in node.hosts],
                }
                for node in self._nodes.values()
            ]

    def delete_node(self, path: str) -> Any:
        """Return the operation that deletes it; the one under way when it is being deleted already (a guess). Raises Refusal."""
        with self._lock, self._store.together():
            self.end(path)
            return copy.deepcopy(self._operations.get(self._find(path).operation))

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

    def limits(self) -> dict[str, Any]:
        """The rules that are set: {capacity, quota, unreachable}."""
        with self._lock:
            return self._limits.describe()

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


def _answers(name: str, query: str) -> bool:
    return name.startswith(query) if not query or query.endswith("/") else name == query
