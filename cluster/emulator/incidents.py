"""What befalls nodes and hosts: preemption, maintenance, hosts that die, hang or come back, and an API that does not say what is."""

import functools
import signal

from cluster.emulator.checks import FAILED_PRECONDITION, INVALID_ARGUMENT, not_found
from cluster.emulator.lives import CREATING, PREEMPTED, READY, REPAIRING, STARTING, Lives
from cluster.emulator.model import HostRecord, NodeRecord, Refusal

_UNHEALTHY_MAINTENANCE = 5
_PREEMPTED_KEY, _MAINTENANCE_KEY = "instance/preempted", "instance/maintenance-event"
_WHILE_PREEMPTED = "Cloud TPU received a bad request. update is not supported while in state PREEMPTED [EID: 0xe48e]"


class Incidents(Lives):
    """A node is named by its path, or by its id where that is clear."""

    def resume(self) -> None:
        """Also what was announced, or begun, and not done yet."""
        super().resume()
        with self._lock:
            nodes = list(self._nodes.values())
        for node in nodes:
            if node.message.state == PREEMPTED:
                self.clock.after(0.0, functools.partial(self._kill, node))
            elif node.message.state == REPAIRING:
                self.clock.after(self._profile.maintenance, functools.partial(self._come_back, node))
            elif _PREEMPTED_KEY in node.notices:
                self.clock.after(self._profile.notice, functools.partial(self._take_back, node))
            elif _MAINTENANCE_KEY in node.notices:
                self.clock.after(self._profile.notice, functools.partial(self._repair, node))

    def preempt(self, name: str, *, notice: float | None = None) -> None:
        """Take a node back: its hosts' metadata say so, and after `notice` seconds (None: the profile's; 0: at once) it is PREEMPTED and
        its hosts are killed. The node stays until it is deleted. Raises Refusal.
        """
        with self._lock:
            node = self._named(name, CREATING, READY, STARTING)
            node.notices[_PREEMPTED_KEY] = "TRUE"
            self._tell(node)
            seconds = self._profile.notice if notice is None else notice
            if seconds > 0:
                self.clock.after(seconds, functools.partial(self._take_back, node))
        if seconds <= 0:
            self._take_back(node)

    def maintain(self, name: str, *, notice: float | None = None) -> None:
        """Maintenance: the metadata say so, after `notice` seconds the hosts are ended and the node is REPAIRING (a guess), and after the
        profile's `maintenance` seconds they boot again. Raises Refusal.
        """
        with self._lock:
            node = self._named(name, READY)
            node.notices[_MAINTENANCE_KEY] = "TERMINATE_ON_HOST_MAINTENANCE"
            self._tell(node)
            self.clock.after(self._profile.notice if notice is None else notice, functools.partial(self._repair, node))

    def kill_host(self, name: str, worker: int) -> None:
        """The host dies; the node stays READY. Raises Refusal."""
        self._signal(name, worker, signal.SIGKILL)

    def hang_host(self, name: str, worker: int) -> None:
        """The host stands still, until `wake_host`. Raises Refusal."""
        self._signal(name, worker, signal.SIGSTOP)

    def wake_host(self, name: str, worker: int) -> None:
        """Raises Refusal."""
        self._signal(name, worker, signal.SIGCONT)

    def boot_host(self, name: str, worker: int) -> None:
        """Boot a host that has died or never booted, on the disk it had. Raises Refusal."""
        node, host = self._host(name, worker)
        self.clock.after(0.0, functools.partial(self._boot, node, host))

    def run_on_host(self, name: str, worker: int, command: str) -> dict[str, object]:
        """Run a shell command on a host, as SSH does: its exit code and what it wrote. What it leaves running lives as long as the host.
        Raises Refusal.
        """
        node, host = self._host(name, worker)
        code, output = self._hosts.run(node, host, command)
        return {"code": code, "output": output}

    def host_environment(self, name: str, worker: int) -> dict[str, object]:
        """What a process of a host starts with, as a login does: its environment and its folder. It is one of the host's processes, and
        lives as long as that. Raises Refusal.
        """
        node, host = self._host(name, worker)
        found = self._hosts.environment(node, host)
        if found is None:
            raise Refusal(FAILED_PRECONDITION, f"host {worker} of node '{node.path}' is an address only")
        return {"env": found[0], "cwd": str(found[1])}

    def set_node_state(self, name: str, state: str) -> None:
        """Let the API show a state, whatever the hosts do. Raises Refusal."""
        with self._lock:
            node = self._named(name)
            values = type(node.message).DESCRIPTOR.fields_by_name["state"].enum_type.values_by_name
            if state not in values:
                raise Refusal(INVALID_ARGUMENT, f"there is no node state {state!r}; known: {', '.join(values)}")
            self._settle(node, values[state].number)

    def _take_back(self, node: NodeRecord) -> None:
        with self._lock, self._store.together():
            if not any(self._is(node, state) for state in (CREATING, READY, STARTING)):
                return
            self._operations.fail(node.operation, INVALID_ARGUMENT, _WHILE_PREEMPTED)
            self._settle(node, PREEMPTED)
        self.clock.after(0.0, functools.partial(self._kill, node))

    def _kill(self, node: NodeRecord) -> None:
        self._end_hosts(node, PREEMPTED, self._hosts.halt, self._kill)

    def _repair(self, node: NodeRecord) -> None:
        with self._lock:
            if not self._is(node, READY):
                return
            node.message.health = _UNHEALTHY_MAINTENANCE
            self._settle(node, REPAIRING)
        self._halt_for_repair(node)
        self.clock.after(self._profile.maintenance, functools.partial(self._come_back, node))

    def _halt_for_repair(self, node: NodeRecord) -> None:
        self._end_hosts(node, REPAIRING, self._hosts.halt, self._halt_for_repair)

    def _come_back(self, node: NodeRecord) -> None:
        with self._lock:
            node.notices.pop(_MAINTENANCE_KEY, None)
            for host in node.hosts:
                host.process, host.exited = None, False
        self._bring_up(node)

    def _tell(self, node: NodeRecord) -> None:
        self._store.put_node(node)
        self._hosts.announce(node)

    def _signal(self, name: str, worker: int, number: int) -> None:
        node, host = self._host(name, worker)
        self._hosts.signal(node, host, number)

    def _host(self, name: str, worker: int) -> tuple[NodeRecord, HostRecord]:
        with self._lock:
            node = self._named(name, READY)
            if not 0 <= worker < len(node.hosts):
                raise not_found(f"{node.path}/hosts/{worker}")
            return node, node.hosts[worker]

    def _named(self, name: str, *states: int) -> NodeRecord:
        """Raises Refusal, also when it is in none of `states` (none given: any)."""
        found = [node for path, node in self._nodes.items() if name in (path, node.node_id)]
        if not found:
            raise not_found(name)
        if len(found) > 1:
            raise Refusal(INVALID_ARGUMENT, f"several nodes are called {name}: {', '.join(node.path for node in found)}")
        if states and found[0].message.state not in states:
            raise Refusal(FAILED_PRECONDITION, f"node '{found[0].path}' is in state {self.state_name(found[0])}")
        return found[0]
