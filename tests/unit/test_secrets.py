"""SecretStore against the emulated service in this process."""

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cluster.cloud_errors import (
    AlreadyExistsError,
    ApiDisabledError,
    CloudError,
    NotFoundError,
    PermissionDeniedError,
    TransientError,
    UnknownError,
)
from cluster.emulator.embedded import Embedded, embedded_emulator
from cluster.emulator.faults import Effect, Fault
from cluster.secrets import SecretStore

PAYLOAD = "a payload that nobody may see"


@pytest.fixture
def emulator() -> Iterator[Embedded]:
    with embedded_emulator() as running:
        yield running


@pytest.fixture
def store(emulator: Embedded) -> Iterator[SecretStore]:
    made = SecretStore(emulator.endpoint, "my-project", sleep=lambda _: None)
    yield made
    made.close()


def test_create_read_list_delete_round_trip(store: SecretStore) -> None:
    store.create("one", PAYLOAD, {"cluster": "mine", "kind": "token"})
    store.create("two", b"zwei", {"cluster": "mine"})
    store.create("three", "drei", {"cluster": "other"})
    assert (store.read("one"), store.read("two")) == (PAYLOAD, "zwei")
    assert store.list({"cluster": "mine"}) == ["one", "two"]
    assert store.list({"cluster": "mine", "kind": "token"}) == ["one"]
    assert store.list({}) == ["one", "three", "two"]
    assert (store.delete("one"), store.delete("one")) == (True, False)
    with pytest.raises(NotFoundError, match="secret one: does not exist"):
        store.read("one")


def test_secret_of_the_same_labels_gets_a_version_and_another_is_left_alone(store: SecretStore) -> None:
    store.create("s", "first", {"cluster": "mine"})
    store.create("s", "second", {"cluster": "mine"})
    assert store.read("s") == "second"
    with pytest.raises(AlreadyExistsError, match="not those of this cluster: cluster=mine"):
        store.create("s", "third", {"cluster": "other"})
    assert store.read("s") == "second"


@pytest.mark.parametrize(
    ("preset", "kind", "advice"),
    [
        ("secrets-permission", PermissionDeniedError, "roles/secretmanager.admin"),
        ("secrets-api-disabled", ApiDisabledError, "gcloud services enable secretmanager.googleapis.com"),
    ],
)
def test_refusal_names_what_to_grant(store: SecretStore, emulator: Embedded, preset: str, kind: type[CloudError], advice: str) -> None:
    emulator.cloud.faults.add(Fault.from_dict({"preset": preset}))
    for act in (lambda: store.create("s", PAYLOAD, {}), lambda: store.read("s"), lambda: store.delete("s"), lambda: store.list({})):
        with pytest.raises(kind, match=advice) as caught:
            act()
        assert PAYLOAD not in str(caught.value)


@pytest.mark.parametrize("effect", [Effect.DROP, Effect.DROP_ANSWER])
@pytest.mark.parametrize("method", ["CreateSecret", "AddSecretVersion", "AccessSecretVersion", "DeleteSecret", "ListSecrets"])
def test_lost_call_or_answer_is_repeated(store: SecretStore, emulator: Embedded, effect: Effect, method: str) -> None:
    emulator.cloud.faults.add(Fault(effect, method, count=1))
    store.create("s", PAYLOAD, {"cluster": "mine"})
    assert store.read("s") == PAYLOAD
    assert store.list({"cluster": "mine"}) == ["s"]
    store.delete("s")
    assert store.list({}) == []


def test_service_that_stays_away_is_given_up_after_the_patience(emulator: Embedded) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    store = SecretStore("127.0.0.1:1", "my-project", patience=20.0, clock=lambda: now, sleep=sleep, jitter=lambda: 1.0)
    with pytest.raises(TransientError, match="the service stumbled"):
        store.read("s")
    assert 10.0 < now <= 20.0
    store.close()


def test_destroyed_version_and_binary_payload_are_told_apart(store: SecretStore, emulator: Embedded) -> None:
    store.create("s", b"\xff\xfe", {})
    with pytest.raises(UnknownError, match="it is not text"):
        store.read("s")
    emulator.cloud.secrets.destroy("projects/my-project/secrets/s/versions/1")
    with pytest.raises(NotFoundError, match="is in DESTROYED state"):
        store.read("s")


def test_payload_that_arrives_changed_is_not_taken(emulator: Embedded, store: SecretStore) -> None:
    class Changing:
        def __init__(self, client: Any) -> None:
            self._client = client

        def __getattr__(self, name: str) -> Any:
            real: Callable[..., Any] = getattr(self._client, name)
            if name != "access_secret_version":
                return real

            def call(*args: Any, **more: Any) -> Any:
                answer = real(*args, **more)
                answer.payload.data = b"other"
                return answer

            return call

    store.create("s", PAYLOAD, {})
    changed = SecretStore(None, "my-project", client=Changing(store._client))  # type: ignore[arg-type]  # stands in for the client
    with pytest.raises(TransientError, match="checksums differ"):
        changed.read("s")


def test_payload_is_in_no_log_and_not_in_what_the_service_shows(
    store: SecretStore, emulator: Embedded, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    emulator.cloud.faults.add(Fault(Effect.ERROR, "AccessSecretVersion", words="no {resource} for {method}", count=1, code=13))
    store.create("s", PAYLOAD, {})
    store.read("s")
    everything = [caplog.text, str(emulator.cloud.describe()), str(emulator.cloud.instances.describe()), str(emulator.cloud.faults.rules())]
    assert not [text for text in everything if PAYLOAD in text]


HEAVY = ["google.cloud.compute_v1", "google.cloud.secretmanager_v1", "google.api_core"]


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        ("launcher.cli.main, cluster.compute, cluster.secrets, cluster.emulator.daemon", HEAVY),
        ("launcher.cli.main", [*HEAVY, "grpc", "hydra", "omegaconf", "numpy", "jax", "ray"]),
    ],
)
def test_no_command_pays_for_imports_that_it_does_not_need(modules: str, without: list[str]) -> None:
    code = f"import sys, {modules}\nprint(sorted(set({without}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
