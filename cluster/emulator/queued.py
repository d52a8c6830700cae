"""Queued resources: requests that wait for capacity and then make their nodes. Knows no gRPC.

What happens next is always decided from what is there now (`_next`): after a timer, after a change of a node, and after a restart alike.
"""

import copy
import functools
import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from cluster.emulator.checks import (
    ALREADY_EXISTS,
    FAILED_PRECONDITION,
    INVALID_ARGUMENT,
    already_exists,
    check_parent,
    check_resource_id,
    not_found,
)
from cluster.emulator.clock import Clock
from cluster.emulator.limits import Claim
from cluster.emulator.model import NodeRecord, QueuedRecord, Refusal
from cluster.emulator.operations import Operations
from cluster.emulator.paging import page
from cluster.emulator.profile import Profile
from cluster.emulator.queued_states import BY_USER, TRANSITIONS, Event, State
from cluster.emulator.store import Store

log = logging.getLogger(__name__)
# google.cloud.tpu.v2.Node.State
_READY, _DELETING = 2, 5
_LOST = frozenset({11, 12})
_DEADLINE_EXCEEDED, _INTERNAL = 4, 13
_USER, _SERVICE = 1, 2


class Nodes(Protocol):
    """What the rest of the cloud does for queued resources. Called under the lock."""

    def claim(self, zone: str, body: Any) -> Claim:
        """What a raw Node asks for, checked. Raises Refusal."""

    def check_free(self, path: str) -> None:
        """Raises Refusal when there is a node of that name."""

    def check_quota(self, wanted: list[Claim]) -> None:
        """Raises Refusal."""

    def fits(self, wanted: list[Claim]) -> bool:
        """Whether there is capacity for all of them now."""

    def reachable(self, paths: Iterable[str]) -> list[str]:
        """Those of resources that a list can show now."""

    def make(self, path: str, body: Any) -> None:
        """Begin a node without an operation."""

    def members(self, queued: str) -> list[NodeRecord]:
        """The nodes of the queued resource."""

    def end(self, path: str) -> None:
        """Begin the deletion of a node, unless it is under way."""


class QueuedResources:
    """Every queued resource, in memory and in the store. Safe to use from several threads."""

    def __init__(
        self, nodes: Nodes, operations: Operations, store: Store, clock: Clock, profile: Profile, lock: AbstractContextManager[Any]
    ) -> None:
        self._nodes, self._operations, self._store, self._clock, self._lock = nodes, operations, store, clock, lock
        self._all = {queued.path: queued for queued in store.queued()}
        self._dwell = {State.CREATING: profile.accept, State.ACCEPTED: profile.queue, State.SUSPENDING: profile.suspend}
        self._next: dict[State, Callable[[QueuedRecord], Event | None]] = {
            State.CREATING: self._look_at_request,
            State.ACCEPTED: self._look_for_capacity,
            State.WAITING_FOR_RESOURCES: self._look_for_capacity,
            State.PROVISIONING: self._look_at_new_nodes,
            State.ACTIVE: self._look_for_losses,
            State.SUSPENDING: lambda _: Event.SUSPEND,
            State.SUSPENDED: lambda _: None,
            State.FAILED: lambda _: None,
            State.DELETING: self._look_at_what_is_left,
        }
        self._effects: dict[Event, Callable[[QueuedRecord], None]] = {
            Event.ACCEPT: lambda queued: self._operations.succeed(queued.operation, queued.message),
            Event.REFUSE: self._refuse,
            Event.PROVISION: self._make_nodes,
            Event.EXPIRE: functools.partial(_fail, code=_DEADLINE_EXCEEDED, words="The queued resource expired before it got capacity."),
            Event.FAIL: functools.partial(_fail, code=_INTERNAL, words="an internal error has occurred"),
            Event.RESET: lambda queued: self._operations.succeed(queued.operation, queued.message),
            Event.DELETE: self._end_nodes,
            Event.VANISH: self._forget,
        }

    def resume(self) -> None:
        """Take up what an earlier daemon left."""
        with self._lock:
            for queued in list(self._all.values()):
                self._wake(queued)

    def create(self, parent: str, queued_id: str, body: Any, request_id: str = "") -> Any:
        """Accept a raw QueuedResource and return the operation; the earlier one where `request_id` is known already. Raises Refusal."""
        zone = check_parent(parent)
        check_resource_id("queuedResourceId", queued_id)
        path = f"{parent}/queuedResources/{queued_id}"
        with self._lock, self._store.together():
            earlier = self._earlier("create", path, request_id)
            if earlier is not None:
                return earlier
            if path in self._all:
                raise already_exists(path)
            message = self._new_message(path, zone, body)
            wanted = self._claims(message, zone)
            for node_path, _ in specified(message):
                self._nodes.check_free(node_path)
            self._nodes.check_quota(wanted)
            operation = self._operations.begin(parent, path, "create")
            queued = QueuedRecord(message, operation.name, self._clock.now())
            self._all[path] = queued
            self._remember("create", path, request_id, operation.name)
            self._store.put_queued(queued)
            self._wake(queued)
            return copy.deepcopy(operation)

    def get(self, path: str) -> Any:
        """Raises Refusal."""
        with self._lock:
            return copy.deepcopy(self._find(path).message)

    def list_page(self, parent: str, page_size: int = 0, page_token: str = "") -> tuple[list[bytes], str]:
        """Serialized QueuedResources of a zone (or of all, with zone `-`), and the token of the next page. Raises Refusal."""
        with self._lock:
            paths, token = page(self._nodes.reachable(self._all), parent, "queuedResources", page_size, page_token)
            return [self._all[path].message.SerializeToString() for path in paths], token

    def delete(self, path: str, *, force: bool = False, request_id: str = "") -> Any:
        """Return the operation that deletes it; the one under way when it is being deleted already, or a new one when a fault keeps that
        from ending (a guess).

        Raises Refusal without `force` while it has nodes. The client's own documentation lets FAILED and SUSPENDED ones go without it; we
        are as strict there as the service was seen to be, so that a client that passes here passes there. The words are a guess.
        """
        with self._lock, self._store.together():
            earlier = self._earlier("delete", path, request_id)
            if earlier is not None:
                return earlier
            queued = self._find(path)
            if _state(queued) is State.DELETING:
                if self._operations.hangs(queued.operation):
                    queued.operation = self._operations.begin(queued.parent, path, "delete").name
                    self._wake(queued)
                self._end_nodes(queued)  # one of them may have failed to go
            else:
                nodes = self._nodes.members(path)
                if not force and (nodes or _state(queued) is State.PROVISIONING):
                    names = ", ".join(node.node_id for node in nodes)
                    words = f"Queued resource '{path}' is {_state(queued).name} and has nodes ({names}); use force to delete them with it"
                    raise Refusal(FAILED_PRECONDITION, words)
                self._operations.fail(queued.operation, 10, "The queued resource was deleted.")  # ABORTED, a guess
                queued.operation = self._operations.begin(queued.parent, path, "delete").name
                doom = self._operations.doom(queued.operation)
                if doom is not None:
                    self._operations.fail(queued.operation, doom.code, doom.words)
                else:
                    self._apply(queued, Event.DELETE)
            self._remember("delete", path, request_id, queued.operation)
            return copy.deepcopy(self._operations.get(queued.operation))

    def reset(self, path: str) -> Any:
        """Let a FAILED or SUSPENDED one wait for capacity again; what is left of its nodes goes first (a guess). Raises Refusal."""
        with self._lock, self._store.together():
            queued = self._find(path)
            if (_state(queued), Event.RESET) not in TRANSITIONS:
                raise Refusal(FAILED_PRECONDITION, f"Queued resource '{path}' cannot be reset while it is {_state(queued).name}")  # a guess
            for node in self._nodes.members(path):
                self._nodes.end(node.path)
            queued.operation = self._operations.begin(queued.parent, path, "reset").name
            name = queued.operation
            self._apply(queued, Event.RESET)
            return copy.deepcopy(self._operations.get(name))

    def cancel(self, operation: str) -> bool:
        """Whether `operation` was a creation still under way, which then leaves nothing. Under the lock."""
        for queued in self._all.values():
            if queued.operation == operation and _state(queued) is State.CREATING:
                self._operations.fail(operation, 1, "The operation was cancelled.")
                queued.operation = self._operations.begin(queued.parent, queued.path, "delete").name
                self._apply(queued, Event.DELETE)
                return True
        return False

    def claims(self) -> list[Claim]:
        """What counts against quota: all of them, also FAILED and SUSPENDED ones (public reports). Under the lock."""
        return [claim for queued in self._all.values() for claim in self._claims(queued.message, queued.zone)]

    def look(self, path: str = "") -> None:
        """Something has changed: for the queued resource `path`, or capacity for those that wait, the oldest first. Under the lock."""
        concerned = [path] if path else [name for name, queued in self._all.items() if _state(queued) is State.WAITING_FOR_RESOURCES]
        for name in concerned:
            if name in self._all:
                self._step(self._all[name])

    def _step(self, queued: QueuedRecord) -> None:
        """As far as it goes now."""
        with self._lock, self._store.together():
            while self._all.get(queued.path) is queued:
                state = _state(queued)
                if self._clock.now() < queued.entered + self._dwell.get(state, 0.0):
                    return  # a timer was set when it came here
                event = self._next[state](queued)
                if event is None:
                    return
                self._apply(queued, event)

    def _apply(self, queued: QueuedRecord, event: Event) -> None:
        after = TRANSITIONS[_state(queued), event]
        log.info("queued resource %s: %s, since %s", queued.path, after.name if after is not None else "gone", event.value)
        if after is not None:
            _set_state(queued.message, after, _USER if event in BY_USER else _SERVICE)
            queued.entered = self._clock.now()
        effect = self._effects.get(event)
        if effect is not None:
            effect(queued)
        if after is not None:
            self._store.put_queued(queued)
            self._wake(queued)

    def _wake(self, queued: QueuedRecord) -> None:
        """See to it that it is looked at when its time in this state is over, and whenever else time alone changes something."""
        now = self._clock.now()
        moments = [queued.entered + self._dwell.get(_state(queued), 0.0), *(moment for moment in _validity(queued.message) if moment)]
        for moment in {max(now, moment) for moment in moments}:
            self._clock.after(moment - now, functools.partial(self._step, queued))

    def _look_at_request(self, queued: QueuedRecord) -> Event | None:
        if self._operations.hangs(queued.operation):
            return None
        return Event.REFUSE if self._operations.doom(queued.operation) is not None else Event.ACCEPT

    def _refuse(self, queued: QueuedRecord) -> None:
        doom = self._operations.doom(queued.operation)
        assert doom is not None
        _fail(queued, code=doom.code, words=doom.words)
        self._operations.fail(queued.operation, doom.code, doom.words)

    def _look_at_what_is_left(self, queued: QueuedRecord) -> Event | None:
        return None if self._operations.hangs(queued.operation) or self._nodes.members(queued.path) else Event.VANISH

    def _look_for_capacity(self, queued: QueuedRecord) -> Event | None:
        begin, end = _validity(queued.message)
        if end is not None and self._clock.now() >= end:
            return Event.EXPIRE
        early = begin is not None and self._clock.now() < begin
        # What a reset has left of the nodes has to be gone first.
        if not early and not self._nodes.members(queued.path) and self._nodes.fits(self._claims(queued.message, queued.zone)):
            return Event.PROVISION
        return Event.WAIT if _state(queued) is State.ACCEPTED else None

    def _look_at_new_nodes(self, queued: QueuedRecord) -> Event | None:
        nodes = self._nodes.members(queued.path)
        states = [node.message.state for node in nodes]
        if _LOST.intersection(states):
            return Event.LOSE
        if len(nodes) < len(specified(queued.message)) or _DELETING in states:
            return Event.FAIL
        return Event.READY if set(states) == {_READY} else None

    def _look_for_losses(self, queued: QueuedRecord) -> Event | None:
        nodes = self._nodes.members(queued.path)
        lost = any(node.message.state in _LOST | {_DELETING} for node in nodes)
        return Event.LOSE if lost or len(nodes) < len(specified(queued.message)) else None

    def _make_nodes(self, queued: QueuedRecord) -> None:
        for path, body in specified(queued.message):
            self._nodes.make(path, body)

    def _end_nodes(self, queued: QueuedRecord) -> None:
        for node in self._nodes.members(queued.path):
            self._nodes.end(node.path)

    def _forget(self, queued: QueuedRecord) -> None:
        from google.protobuf import empty_pb2

        del self._all[queued.path]
        self._store.remove_queued(queued.path)
        self._operations.succeed(queued.operation, empty_pb2.Empty())

    def _find(self, path: str) -> QueuedRecord:
        if path not in self._all:
            raise not_found(path)
        return self._all[path]

    def _claims(self, message: Any, zone: str) -> list[Claim]:
        return [self._nodes.claim(zone, body) for _, body in specified(message)]

    def _new_message(self, path: str, zone: str, body: Any) -> Any:
        """Raises Refusal."""
        message = copy.deepcopy(body)
        message.name = path
        message.create_time.FromNanoseconds(int(self._clock.now() * 1e9))
        _check_specs(message, zone)
        _set_state(message, State.CREATING, _USER)
        return message

    def _earlier(self, verb: str, path: str, request_id: str) -> Any:
        """The operation of an earlier call with the same request id, or None where there was none or it is forgotten."""
        name = self._store.request(f"{verb} {path} {request_id}") if request_id else None
        return copy.deepcopy(self._operations.get(name)) if name is not None and self._operations.known(name) else None

    def _remember(self, verb: str, path: str, request_id: str, operation: str) -> None:
        if request_id:
            self._store.put_request(f"{verb} {path} {request_id}", operation)


def specified(message: Any) -> list[tuple[str, Any]]:
    """Path and body of every node that a raw QueuedResource asks for."""
    parent, _, queued_id = message.name.partition("/queuedResources/")
    found = []
    for spec in message.tpu.node_spec:
        body = copy.deepcopy(spec.node)
        body.queued_resource = message.name
        body.scheduling_config.spot = body.scheduling_config.spot or message.HasField("spot")
        body.scheduling_config.reserved = body.scheduling_config.reserved or bool(message.reservation_name)
        ids = [spec.node_id]
        if spec.HasField("multislice_params"):
            body.multislice_node = True
            prefix = spec.multislice_params.node_id_prefix or queued_id
            ids = [f"{prefix}-{index}" for index in range(spec.multislice_params.node_count)]
        found += [(f"{parent}/nodes/{node_id}", body) for node_id in ids]
    return found


def _check_specs(message: Any, zone: str) -> None:
    """Raises Refusal. The words are guesses."""
    start = "Cloud TPU received an invalid argument."
    if not message.tpu.node_spec:
        raise Refusal(INVALID_ARGUMENT, f'{start} The "tpu.nodeSpec" value "" was not found.')
    for spec in message.tpu.node_spec:
        if spec.parent.rpartition("/")[2] != zone:
            raise Refusal(INVALID_ARGUMENT, f'{start} The "nodeSpec.parent" value "{spec.parent}" is not that of the request.')
        if spec.HasField("multislice_params") and spec.multislice_params.node_count < 2:
            raise Refusal(INVALID_ARGUMENT, f'{start} The "nodeCount" value "{spec.multislice_params.node_count}" must be greater than 1.')
    paths = [path for path, _ in specified(message)]
    for path in paths:
        check_resource_id("nodeId", path.rpartition("/")[2])
    if len(set(paths)) < len(paths):
        raise Refusal(ALREADY_EXISTS, f"{start} Two nodes of the request have the same name.")


def _validity(message: Any) -> tuple[float | None, float | None]:
    """From when and until when the request may be served, seconds since the epoch; None: no such limit."""
    policy, created = message.queueing_policy, message.create_time.ToNanoseconds() / 1e9
    match policy.WhichOneof("start_timing_constraints"):
        case "valid_until_duration":
            return None, created + policy.valid_until_duration.ToNanoseconds() / 1e9
        case "valid_until_time":
            return None, policy.valid_until_time.ToNanoseconds() / 1e9
        case "valid_after_duration":
            return created + policy.valid_after_duration.ToNanoseconds() / 1e9, None
        case "valid_after_time":
            return policy.valid_after_time.ToNanoseconds() / 1e9, None
        case "valid_interval":
            return policy.valid_interval.start_time.ToNanoseconds() / 1e9, policy.valid_interval.end_time.ToNanoseconds() / 1e9
        case _:
            return None, None


def _state(queued: QueuedRecord) -> State:
    return State(queued.message.state.state)


def _set_state(message: Any, state: State, initiator: int) -> None:
    message.state.Clear()
    message.state.state, message.state.state_initiator = state, initiator
    data = f"{state.name.lower()}_data"
    if data in message.state.DESCRIPTOR.fields_by_name:
        getattr(message.state, data).SetInParent()


def _fail(queued: QueuedRecord, *, code: int, words: str) -> None:
    error = queued.message.state.failed_data.error
    error.code, error.message = code, words
