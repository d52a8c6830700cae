"""Secret Manager: secrets and their versions. Knows no gRPC. What is secret lies in the store only and is never logged or described.

As with the real service, answers name the project by its number, whatever the request called it. The words of refusals are those of the
real one as public logs show them, as far as they are known.
"""

import re
from contextlib import AbstractContextManager
from typing import Any

import google_crc32c

from cluster.emulator.checks import ALREADY_EXISTS, FAILED_PRECONDITION, INVALID_ARGUMENT, NOT_FOUND
from cluster.emulator.clock import Clock
from cluster.emulator.filters import parse
from cluster.emulator.model import Refusal, project_number
from cluster.emulator.paging import cut
from cluster.emulator.store import Store

# google.cloud.secretmanager.v1.SecretVersion.State
_ENABLED, _DESTROYED = 1, 3
_ID = re.compile(r"[a-zA-Z0-9_-]{1,255}")
_LABEL = re.compile(r"[a-z][a-z0-9_-]{0,62}"), re.compile(r"[a-z0-9_-]{0,63}")
_MAX_LABELS = 64
_MAX_BYTES = 64 * 1024
_PAGE = 25000


class Secrets:
    """Every secret of every project. Safe to use from several threads."""

    def __init__(self, store: Store, clock: Clock, lock: AbstractContextManager[Any]) -> None:
        self._store, self._clock, self._lock = store, clock, lock

    def create(self, parent: str, secret_id: str, body: Any) -> Any:
        """A raw Secret, made from `body`. Raises Refusal."""
        if not _ID.fullmatch(secret_id):
            raise Refusal(INVALID_ARGUMENT, f"The provided Secret ID [{secret_id}] does not match the expected format [[a-zA-Z_0-9]+]")
        if not body.HasField("replication"):
            raise Refusal(INVALID_ARGUMENT, "The replication policy is required.")  # a guess
        _check_labels(dict(body.labels))
        path = f"{_canonical(parent)}/secrets/{secret_id}"
        with self._lock:
            if self._store.secret(path) is not None:
                raise Refusal(ALREADY_EXISTS, f"Secret [{path}] already exists.")
            secret = type(body)()
            secret.CopyFrom(body)
            secret.name = path
            secret.create_time.FromNanoseconds(int(self._clock.now() * 1e9))
            self._store.put_secret(secret)
            return secret

    def get(self, path: str) -> Any:
        """Raises Refusal."""
        with self._lock:
            return self._find(_canonical(path))

    def list_page(self, parent: str, wanted: str, size: int, token: str) -> tuple[list[Any], str, int]:
        """Raw Secrets, the token of the next page, and how many there are in all. `wanted`: a filter. Raises Refusal."""
        matches = parse(wanted)
        prefix = f"{_canonical(parent)}/secrets/"
        with self._lock:
            found = {secret.name: secret for secret in self._store.secrets() if secret.name.startswith(prefix)}
        shown = [name for name, secret in found.items() if matches({"name": name, "labels": dict(secret.labels)})]
        names, following = cut(shown, size, token, most=_PAGE)
        return [found[name] for name in names], following, len(shown)

    def delete(self, path: str) -> None:
        """With all of its versions. Raises Refusal."""
        with self._lock, self._store.together():
            self._store.remove_secret(self._find(_canonical(path)).name)

    def add_version(self, path: str, payload: Any) -> Any:
        """A raw SecretVersion for a raw SecretPayload. Raises Refusal."""
        from google.cloud import secretmanager_v1

        if len(payload.data) > _MAX_BYTES:
            raise Refusal(INVALID_ARGUMENT, "The secret payload is larger than the maximum of 65536 bytes.")  # a guess
        if payload.HasField("data_crc32c") and payload.data_crc32c != google_crc32c.value(payload.data):
            raise Refusal(INVALID_ARGUMENT, "The checksum of the payload does not match the one that was given.")  # a guess
        with self._lock, self._store.together():
            secret = self._find(_canonical(path))
            number = self._store.newest_version(secret.name) + 1
            version = secretmanager_v1.SecretVersion.pb()(name=f"{secret.name}/versions/{number}", state=_ENABLED)
            version.create_time.FromNanoseconds(int(self._clock.now() * 1e9))
            version.client_specified_payload_checksum = payload.HasField("data_crc32c")
            version.replication_status.automatic.SetInParent()
            self._store.put_secret_version(secret.name, number, version, payload.data)
            return version

    def get_version(self, path: str) -> Any:
        """Raises Refusal."""
        with self._lock:
            return self._version(path)[0]

    def list_versions(self, path: str, size: int, token: str) -> tuple[list[Any], str, int]:
        """Raw SecretVersions, the newest first, the token of the next page, and how many there are in all. Raises Refusal."""
        with self._lock:
            secret = self._find(_canonical(path))
            numbers = range(self._store.newest_version(secret.name), 0, -1)
            found = {f"{10**12 - number:013}": self._store.secret_version(secret.name, number) for number in numbers}
        names, following = cut(found, size, token, most=_PAGE)
        return [version[0] for name in names if (version := found[name]) is not None], following, len(found)

    def access(self, path: str) -> tuple[str, bytes]:
        """The version's full name and its payload. Raises Refusal."""
        with self._lock:
            version, data = self._version(path)
        if version.state != _ENABLED:
            raise _wrong_state(version)
        return str(version.name), data

    def destroy(self, path: str) -> Any:
        """Raises Refusal."""
        with self._lock, self._store.together():
            version, _ = self._version(path)
            if version.state == _DESTROYED:
                raise _wrong_state(version)
            version.state = _DESTROYED
            version.destroy_time.FromNanoseconds(int(self._clock.now() * 1e9))
            secret, _, number = version.name.rpartition("/versions/")
            self._store.put_secret_version(secret, int(number), version, b"")
            return version

    def _find(self, path: str) -> Any:
        secret = self._store.secret(path)
        if secret is None:
            raise Refusal(NOT_FOUND, f"Secret [{path}] not found.")
        return secret

    def _version(self, path: str) -> tuple[Any, bytes]:
        secret, _, name = _canonical(path).rpartition("/versions/")
        newest = self._store.newest_version(secret)
        if newest == 0:
            raise Refusal(NOT_FOUND, f"Secret [{secret}] not found or has no versions.")
        number = newest if name == "latest" else int(name) if name.isdecimal() else 0
        found = self._store.secret_version(secret, number)
        if found is None:
            raise Refusal(NOT_FOUND, f"Secret Version [{secret}/versions/{name}] not found.")
        return found


def _canonical(path: str) -> str:
    """With the project's number instead of its id. Raises Refusal."""
    parts = path.split("/")
    if len(parts) < 2 or parts[0] != "projects" or not parts[1]:
        raise Refusal(INVALID_ARGUMENT, f"The resource name [{path}] is not valid.")  # a guess
    number = parts[1] if parts[1].isdecimal() else project_number(parts[1])
    return "/".join(("projects", number, *parts[2:]))


def _check_labels(labels: dict[str, str]) -> None:
    """Raises Refusal. The rule is that of the client's documentation; the words are a guess."""
    key_rule, value_rule = _LABEL
    if len(labels) > _MAX_LABELS or not all(key_rule.fullmatch(key) and value_rule.fullmatch(value) for key, value in labels.items()):
        raise Refusal(INVALID_ARGUMENT, "The labels are not valid.")


def _wrong_state(version: Any) -> Refusal:
    name = type(version).DESCRIPTOR.fields_by_name["state"].enum_type.values_by_number[version.state].name
    return Refusal(FAILED_PRECONDITION, f"Secret Version [{version.name}] is in {name} state.")
