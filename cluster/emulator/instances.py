"""The instances of Compute Engine and their lives. Knows no HTTP.

One lock for all that the API shows. Starting and ending processes takes time and happens outside it, under a lock of the instance's own, so
that a deletion waits for a boot under way and a boot never revives what was deleted meanwhile.
"""

import functools
import logging
import secrets
import signal
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.emulator.checks import ALREADY_EXISTS, FAILED_PRECONDITION, INVALID_ARGUMENT, not_found_by_compute
from cluster.emulator.clock import Clock
from cluster.emulator.compute_bodies import check_instance, check_zone, shown, timestamp
from cluster.emulator.compute_operations import ComputeOperations
from cluster.emulator.faults import BOOT_HOST, ON_BOOT, Effect, Faults
from cluster.emulator.filters import Matches, parse
from cluster.emulator.hosts import Hosts, new_hosts
from cluster.emulator.instance_states import TRANSITIONS, Event, State
from cluster.emulator.model import InstanceRecord, Refusal
from cluster.emulator.paging import cut
from cluster.emulator.profile import Profile
from cluster.emulator.store import Store

log = logging.getLogger(__name__)
_ABORTED, _INTERNAL = 10, 13
_PAGE = 500
_RETRY_SECONDS = 5.0
_WAIT_SECONDS = 120.0
"""How long zoneOperations.wait holds a call up at most (its documentation)."""


class Instances:
    """Every instance of every project. Safe to use from several threads."""

    def __init__(self, store: Store, hosts: Hosts, clock: Clock, faults: Faults, lock: Any, *, state_dir: Path, profile: Profile) -> None:
        """`lock`: a threading.RLock, the cloud's. `state_dir` sets where addresses begin."""
        self._store, self._hosts, self._clock, self._faults = store, hosts, clock, faults
        self._state_dir, self._profile = state_dir, profile
        self._lock = lock
        self._ended = threading.Condition(lock)
        self._working: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._operations = ComputeOperations(store, clock, faults)
        self._all = {instance.path: instance for instance in store.instances()}

    def resume(self) -> None:
        """Take up what an earlier daemon left: processes are found again, unfinished work is done. Call once, before serving."""
        with self._lock:
            everything = list(self._all.values())
        for instance in everything:
            if instance.host.held and instance.host.boots_at is not None:
                self._clock.after(max(0.0, instance.host.boots_at - self._clock.now()), functools.partial(self._boot_again, instance))
            if instance.state is State.STOPPING and self._operations.hangs(instance.operation):
                continue
            if instance.state is State.RUNNING:
                self._find_host(instance)
            elif instance.state in self._work:
                self._clock.after(0.0, functools.partial(self._work[instance.state], instance))

    # ---- the API's methods

    def insert(self, project: str, zone: str, body: dict[str, Any], request_id: str = "") -> dict[str, Any]:
        """Accept an instance and return the operation; the earlier one where `request_id` is known already. Raises Refusal."""
        check_zone(zone)
        check_instance(body, zone)
        path = f"projects/{project}/zones/{zone}/instances/{body['name']}"
        with self._lock, self._store.together():
            earlier = self._earlier("insert", path, request_id)
            if earlier is not None:
                return earlier
            if path in self._all:
                raise Refusal(ALREADY_EXISTS, f"The resource '{path}' already exists")
            hosts = new_hosts(self._store, self._state_dir, 1)
            number = secrets.randbits(62)
            view = shown(body, project=project, zone=zone, ip=hosts[0].ip, number=number, now=self._clock.now())
            operation = self._operations.begin(path, str(number), "insert")
            instance = InstanceRecord(path, view, secrets.token_hex(6), hosts, operation)
            self._all[path] = instance
            self._store.put_instance(instance)
            self._remember("insert", path, request_id, operation)
            self._clock.after(self._profile.provision, functools.partial(self._allocate, instance))
            return self._operations.get(operation)

    def get(self, path: str) -> dict[str, Any]:
        """As JSON. Raises Refusal."""
        with self._lock:
            return dict(self._find(path).body)

    def list_page(self, zone: str, wanted: str, size: int, token: str) -> tuple[list[dict[str, Any]], str]:
        """Instances of projects/P/zones/Z, and the token of the next page. `wanted`: a filter. Raises Refusal."""
        matches = parse(wanted)
        with self._lock:
            found = self._below(f"{zone}/instances/", matches)
        paths, following = cut(found, size, token, most=_PAGE)
        return [found[path] for path in paths], following

    def list_everywhere(self, project: str, wanted: str, size: int, token: str) -> tuple[dict[str, list[dict[str, Any]]], str]:
        """Instances of all zones by zone, and the token of the next page. Raises Refusal."""
        matches = parse(wanted)
        with self._lock:
            found = self._below(f"projects/{project}/zones/", matches)
        paths, following = cut(found, size, token, most=_PAGE)
        zones: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for path in paths:
            zones[path.split("/")[3]].append(found[path])
        return dict(zones), following

    def delete(self, path: str, request_id: str = "") -> dict[str, Any]:
        """Return the operation that deletes it; the one under way when it is being deleted already (a guess). Raises Refusal."""
        with self._lock, self._store.together():
            earlier = self._earlier("delete", path, request_id)
            if earlier is not None:
                return earlier
            instance = self._find(path)
            if not (instance.state is State.STOPPING and instance.goes):
                self._fail(instance, Refusal(_ABORTED, "The instance was deleted while it was being created."))  # a guess
                self._begin_deletion(instance)
            self._remember("delete", path, request_id, instance.operation)
            return self._operations.get(instance.operation)

    def get_operation(self, path: str) -> dict[str, Any]:
        """As JSON. Raises Refusal."""
        with self._lock:
            return self._operations.get(path)

    def wait_operation(self, path: str, limit: float = _WAIT_SECONDS) -> dict[str, Any]:
        """The operation when it has ended, or as it is after `limit` seconds of the machine's time. Raises Refusal."""
        with self._ended:
            self._ended.wait_for(lambda: self._operations.done(path), limit)
            return self._operations.get(path)

    # ---- what befalls them

    def describe(self) -> list[dict[str, Any]]:
        """Every instance with what is behind it, for people and tests."""
        with self._lock:
            return [
                {
                    "name": path,
                    "status": one.state.value,
                    "ip": one.host.ip,
                    "exited": one.host.exited,
                    "held": one.host.held,
                    "labels": one.body.get("labels", {}),
                }
                for path, one in self._all.items()
            ]

    def lose(self, name: str, *, keep: bool = False) -> None:
        """The cloud takes the machine back at once, without a word: the instance is gone, or with `keep` TERMINATED. Raises Refusal."""
        with self._lock, self._store.together():
            instance = self._running(name)
            instance.goes = not keep
            self._apply(instance, Event.STOP)
        self._clock.after(0.0, functools.partial(self._halt, instance))

    def kill(self, name: str) -> None:
        """Its processes die; it stays RUNNING. Raises Refusal."""
        self._signal(name, signal.SIGKILL)

    def hang(self, name: str) -> None:
        """Its processes stand still, until `wake`. Raises Refusal."""
        self._signal(name, signal.SIGSTOP)

    def wake(self, name: str) -> None:
        """Raises Refusal."""
        self._signal(name, signal.SIGCONT)

    def boot(self, name: str) -> None:
        """Boot it again after its processes have died, on the disk it had. Raises Refusal."""
        self._clock.after(0.0, functools.partial(self._boot_again, self._running(name)))

    def watch(self) -> None:
        """Write down which startup scripts have ended since the last time. As on the real cloud the instance stays RUNNING."""
        with self._lock:
            for instance in self._all.values():
                if instance.state is State.RUNNING and not instance.host.exited and self._hosts.exited(instance.host):
                    instance.host.exited = True
                    log.warning("instance %s at %s: its startup script has ended", instance.title, instance.host.ip)
                    self._store.put_instance(instance)

    # ---- their lives

    @property
    def _work(self) -> dict[State, Callable[[InstanceRecord], None]]:
        """What an instance in that state waits for."""
        return {State.PROVISIONING: self._allocate, State.STAGING: self._come_up_again, State.STOPPING: self._halt}

    def _allocate(self, instance: InstanceRecord) -> None:
        with self._lock, self._store.together():
            if not self._is(instance, State.PROVISIONING) or self._operations.hangs(instance.operation):
                return
            doom = self._operations.doom(instance.operation)
            if doom is not None:
                self._fail(instance, doom)
                self._apply(instance, Event.REFUSE)
                return
            self._apply(instance, Event.ALLOCATE)
        self._clock.after(self._profile.stage, functools.partial(self._come_up, instance))

    def _come_up_again(self, instance: InstanceRecord) -> None:
        self._hosts.halt(instance)  # it may have been started and not been written down
        self._come_up(instance)

    def _come_up(self, instance: InstanceRecord) -> None:
        with self._working[instance.uid]:
            if not self._is(instance, State.STAGING):
                return
            self._hold(instance)
            try:
                self._hosts.start(instance)
            except OSError as error:
                log.error("instance %s has no host: %s", instance.title, error)
                with self._lock, self._store.together():
                    self._fail(instance, Refusal(_INTERNAL, "Internal error. Please try again or contact Google Support."))
                    self._begin_deletion(instance)
                return
            with self._lock, self._store.together():
                if not self._is(instance, State.STAGING):
                    return  # it is being deleted; that work waits for ours and ends the processes
                instance.body["lastStartTimestamp"] = timestamp(self._clock.now())
                self._apply(instance, Event.BOOT)
                self._operations.succeed(instance.operation)
                self._ended.notify_all()

    def _hold(self, instance: InstanceRecord) -> None:
        """Keep it from booting where a fault says so, for a while or for ever."""
        for fault in self._faults.strike(BOOT_HOST, f"{instance.path}/hosts/0", ON_BOOT)[:1]:
            instance.host.held, instance.host.boots_at = True, None
            if fault.effect is Effect.LATENCY:
                instance.host.boots_at = self._clock.now() + fault.seconds
                self._clock.after(fault.seconds, functools.partial(self._boot_again, instance))

    def _boot_again(self, instance: InstanceRecord) -> None:
        with self._working[instance.uid]:
            if self._is(instance, State.RUNNING):
                instance.host.held, instance.host.boots_at, instance.host.exited = False, None, False
                self._find_host(instance)

    def _find_host(self, instance: InstanceRecord) -> None:
        try:
            self._hosts.start(instance)
        except OSError as error:  # one without its host must not keep the others from being served
            log.error("the host of instance %s cannot be found again: %s", instance.title, error)
        with self._lock:
            self._store.put_instance(instance)

    def _begin_deletion(self, instance: InstanceRecord) -> None:
        instance.operation = self._operations.begin(instance.path, instance.body["id"], "delete")
        doom = self._operations.doom(instance.operation)
        if doom is not None:
            self._fail(instance, doom)
            return
        instance.goes = True
        self._apply(instance, Event.DELETE)
        if not self._operations.hangs(instance.operation):
            self._clock.after(self._profile.delete, functools.partial(self._halt, instance))

    def _halt(self, instance: InstanceRecord) -> None:
        with self._working[instance.uid]:
            if not self._is(instance, State.STOPPING):
                return
            try:
                (self._hosts.stop if instance.goes else self._hosts.halt)(instance)
            except TimeoutError as error:
                log.error("the processes of instance %s have not ended yet: %s", instance.title, error)
                self._clock.after(_RETRY_SECONDS, functools.partial(self._halt, instance))
                return
            with self._lock, self._store.together():
                instance.host.process, instance.host.exited = None, False
                self._apply(instance, Event.VANISH if instance.goes else Event.HALT)
                self._operations.succeed(instance.operation)
                self._ended.notify_all()

    def _apply(self, instance: InstanceRecord, event: Event) -> None:
        """Under the lock."""
        after = TRANSITIONS.get((instance.state, event), instance.state)
        assert (instance.state, event) in TRANSITIONS, (instance.state, event)
        log.info("instance %s: %s, since %s", instance.title, after.value if after is not None else "gone", event.value)
        if after is not None:
            instance.body["status"] = after.value
            self._store.put_instance(instance)
            return
        del self._all[instance.path]
        self._working.pop(instance.uid, None)
        self._store.remove_instance(instance.path)

    def _fail(self, instance: InstanceRecord, reason: Refusal) -> None:
        self._operations.fail(instance.operation, reason)
        self._ended.notify_all()

    def _signal(self, name: str, number: int) -> None:
        instance = self._running(name)
        self._hosts.signal(instance, instance.host, number)

    def _running(self, name: str) -> InstanceRecord:
        with self._lock:
            instance = self._named(name)
            if instance.state is not State.RUNNING:
                raise Refusal(FAILED_PRECONDITION, f"instance '{instance.path}' is {instance.state.value}")
            return instance

    def _named(self, name: str) -> InstanceRecord:
        """By path, or by its last part where that is clear. Raises Refusal."""
        found = [one for path, one in self._all.items() if name in (path, one.title)]
        if not found:
            raise not_found_by_compute(name)
        if len(found) > 1:
            raise Refusal(INVALID_ARGUMENT, f"several instances are called {name}: {', '.join(one.path for one in found)}")
        return found[0]

    def _below(self, prefix: str, matches: Matches) -> dict[str, dict[str, Any]]:
        return {path: dict(one.body) for path, one in self._all.items() if path.startswith(prefix) and matches(one.body)}

    def _earlier(self, verb: str, path: str, request_id: str) -> dict[str, Any] | None:
        """What an earlier call with the same request id has begun."""
        operation = self._store.request(f"{verb} {path} {request_id}") if request_id else None
        return self._operations.get(operation) if operation is not None and self._operations.known(operation) else None

    def _remember(self, verb: str, path: str, request_id: str, operation: str) -> None:
        if request_id:
            self._store.put_request(f"{verb} {path} {request_id}", operation)

    def _is(self, instance: InstanceRecord, state: State) -> bool:
        """Whether `instance` is still there, itself and not a later one of its name, and in `state`."""
        with self._lock:
            return self._all.get(instance.path) is instance and instance.state is state

    def _find(self, path: str) -> InstanceRecord:
        if path not in self._all:
            raise not_found_by_compute(path)
        return self._all[path]
