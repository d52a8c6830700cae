"""The emulated service against clients that know nothing of it: google-cloud-tpu over gRPC (sync, async) and REST, and gcloud.

One script of calls for all of the Python clients: whatever carries a call, the service must answer the same.
"""

import asyncio
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.api_core import exceptions
from google.api_core.future.polling import POLLING_PREDICATE
from google.api_core.retry import Retry
from google.auth.credentials import AnonymousCredentials
from google.cloud import tpu_v2
from google.cloud.tpu_v2.services.tpu.transports import TpuGrpcAsyncIOTransport, TpuGrpcTransport, TpuRestTransport

from cluster.emulator.embedded import Embedded, embedded_emulator
from cluster.emulator.faults import TPU_PRESETS

ZONE = "us-central2-b"
PARENT = f"projects/p/locations/{ZONE}"
POLLING = Retry(predicate=POLLING_PREDICATE, initial=0.02, maximum=0.2, timeout=30)
Call = Callable[..., Any]


@pytest.fixture
def emulator() -> Iterator[Embedded]:
    with embedded_emulator() as running:
        yield running


@pytest.fixture(params=["grpc", "asyncio", "rest"])
def call(request: pytest.FixtureRequest, emulator: Embedded) -> Iterator[Call]:
    """Calls a method of the client by name; operations are waited for, lists are read to their end."""
    yield from _CARRIERS[request.param](emulator)


def _grpc(emulator: Embedded) -> Iterator[Call]:
    channel = grpc.insecure_channel(emulator.endpoint)
    yield _synchronous(tpu_v2.TpuClient(transport=TpuGrpcTransport(channel=channel)))
    channel.close()


def _rest(emulator: Embedded) -> Iterator[Call]:
    host = emulator.rest.removeprefix("http://")
    transport = TpuRestTransport(host=host, credentials=AnonymousCredentials(), url_scheme="http")  # type: ignore[no-untyped-call]
    yield _synchronous(tpu_v2.TpuClient(transport=transport))
    transport.close()  # type: ignore[no-untyped-call]


def _synchronous(client: Any) -> Call:
    def call(method: str, **fields: Any) -> Any:
        answer = getattr(client, method)(fields, timeout=20)
        if hasattr(answer, "pages"):
            return list(answer)
        return answer.result(timeout=30, polling=POLLING) if hasattr(answer, "operation") else answer

    return call


def _asyncio(emulator: Embedded) -> Iterator[Call]:
    with asyncio.Runner() as runner:

        async def connect() -> tuple[Any, Any]:
            channel = grpc.aio.insecure_channel(emulator.endpoint)
            return channel, tpu_v2.TpuAsyncClient(transport=TpuGrpcAsyncIOTransport(channel=channel))

        channel, client = runner.run(connect())

        async def ask(method: str, fields: dict[str, Any]) -> Any:
            answer = await getattr(client, method)(fields, timeout=20)
            if hasattr(answer, "pages"):
                return [item async for item in answer]
            return await answer.result() if hasattr(answer, "operation") else answer

        yield lambda method, **fields: runner.run(ask(method, fields))
        runner.run(channel.close())


_CARRIERS = {"grpc": _grpc, "asyncio": _asyncio, "rest": _rest}


def node(**more: Any) -> dict[str, Any]:
    return {"accelerator_type": "v4-16", "runtime_version": "tpu-ubuntu2204-base", **more}


def test_nodes_live_through_every_method(call: Call) -> None:
    made = call("create_node", parent=PARENT, node_id="n", node=node(labels={"a": "b"}))
    path = f"{PARENT}/nodes/n"
    assert (made.name, made.state, dict(made.labels), len(made.network_endpoints)) == (path, tpu_v2.Node.State.READY, {"a": "b"}, 2)
    assert call("get_node", name=path) == made
    assert call("list_nodes", parent="projects/p/locations/-") == [made]
    assert call("stop_node", name=path).state == tpu_v2.Node.State.STOPPED
    assert call("start_node", name=path).state == tpu_v2.Node.State.READY
    changed = call(
        "update_node", node={"name": path, "description": "mine", "labels": {}}, update_mask={"paths": ["description", "labels"]}
    )
    assert (changed.description, dict(changed.labels)) == ("mine", {})
    call("delete_node", name=path)
    with pytest.raises(exceptions.NotFound, match=r"Resource '.*/nodes/n' was not found"):
        call("get_node", name=path)


def test_queued_resources_live_through_every_method(call: Call, emulator: Embedded) -> None:
    spec = {"parent": PARENT, "node": node(), "multislice_params": {"node_count": 2, "node_id_prefix": "s"}}
    path = f"{PARENT}/queuedResources/q"
    emulator.cloud.set_capacity(ZONE, "v4-16", 1)
    accepted = call(
        "create_queued_resource", parent=PARENT, queued_resource_id="q", queued_resource={"tpu": {"node_spec": [spec]}, "spot": {}}
    )
    assert accepted.name == path
    while call("get_queued_resource", name=path).state.state.name == "ACCEPTED":
        pass
    assert call("get_queued_resource", name=path).state.state.name == "WAITING_FOR_RESOURCES"
    emulator.cloud.set_capacity(ZONE, "v4-16", 2)
    while call("get_queued_resource", name=path).state.state.name != "ACTIVE":
        pass
    assert [item.name for item in call("list_queued_resources", parent=PARENT)] == [path]
    assert [item.name.rpartition("/")[2] for item in call("list_nodes", parent=PARENT)] == ["s-0", "s-1"]
    with pytest.raises(exceptions.BadRequest, match="use force"):
        call("delete_queued_resource", name=path)
    call("delete_queued_resource", name=path, force=True)
    assert call("list_nodes", parent=PARENT) == call("list_queued_resources", parent=PARENT) == []


def test_catalogues_and_locations_are_listed(call: Call) -> None:
    types = {kind.type_: kind for kind in call("list_accelerator_types", parent=PARENT)}
    assert types["v5litepod-16"].accelerator_configs[0].topology == "4x4"
    assert call("get_accelerator_type", name=f"{PARENT}/acceleratorTypes/v6e-8").type_ == "v6e-8"
    assert "v2-alpha-tpuv6e" in {version.version for version in call("list_runtime_versions", parent=PARENT)}
    assert call("get_runtime_version", name=f"{PARENT}/runtimeVersions/v2-alpha-tpuv5").version == "v2-alpha-tpuv5"
    assert ZONE in {location.location_id for location in call("list_locations", name="projects/p").locations}
    assert call("get_location", name=PARENT).location_id == ZONE
    assert "@" in call("generate_service_identity", parent=PARENT).identity.email


@pytest.mark.parametrize("preset", sorted(TPU_PRESETS))
def test_every_known_error_reaches_the_client_in_the_words_of_the_service(call: Call, emulator: Embedded, preset: str) -> None:
    fault = TPU_PRESETS[preset]
    emulator.cloud.faults.add(fault)
    expected = fault.refusal("CreateNode", f"{PARENT}/nodes/n")
    with pytest.raises(exceptions.GoogleAPICallError) as caught:
        call("create_node", parent=PARENT, node_id="n", node=node())
    assert expected.words in str(caught.value)
    emulator.cloud.faults.clear()
    deadline = time.monotonic() + 10
    while call("list_nodes", parent=PARENT):  # a node whose creation failed goes by itself
        assert time.monotonic() < deadline


def test_quota_and_stockout_come_from_limits_with_their_details(call: Call, emulator: Embedded) -> None:
    emulator.cloud.set_quota("us-central2", "v4", 8)
    with pytest.raises(exceptions.TooManyRequests, match=r"Limit: 8 in region us-central2") as caught:
        call("create_node", parent=PARENT, node_id="n", node=node())
    assert caught.value.details
    emulator.cloud.set_quota("us-central2", "v4", None)
    emulator.cloud.set_capacity(ZONE, "v4", 4)
    with pytest.raises(exceptions.GoogleAPICallError, match="There is no more capacity in the zone"):
        call("create_node", parent=PARENT, node_id="n", node=node())


def test_unreachable_zone_is_named_by_lists_and_fails_other_calls(call: Call, emulator: Embedded) -> None:
    call("create_node", parent=PARENT, node_id="n", node=node())
    emulator.cloud.set_reachable(ZONE, False)
    assert call("list_nodes", parent="projects/p/locations/-") == []
    assert emulator.cloud.unreachable("projects/p/locations/-") == [PARENT]
    with pytest.raises(exceptions.ServiceUnavailable, match=ZONE):
        call("get_node", name=f"{PARENT}/nodes/n")


class Gcloud:
    """The real gcloud, pointed at the emulated service by its own settings."""

    def __init__(self, program: str, emulator: Embedded, folder: Path) -> None:
        self._program = program
        self._env = {
            **os.environ,
            "CLOUDSDK_CONFIG": str(folder),
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"{emulator.rest}/",
            "CLOUDSDK_CORE_PROJECT": "p",
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "1",
        }

    def __call__(self, *words: str) -> Any:
        argv = [self._program, "compute", "tpus", *words, "--zone", ZONE, "--format", "json"]
        done = subprocess.run(argv, env=self._env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout or "null")


@pytest.fixture
def gcloud(emulator: Embedded, tmp_path: Path) -> Gcloud:
    program = shutil.which("gcloud")
    if program is None:
        assert os.environ.get("CI") != "true", "gcloud is missing; CI has to have it"
        pytest.skip("gcloud is not installed on this machine")
    return Gcloud(program, emulator, tmp_path)


def test_gcloud_creates_describes_stops_starts_and_deletes_a_node(gcloud: Gcloud) -> None:
    gcloud("tpu-vm", "create", "n", "--accelerator-type", "v4-16", "--version", "tpu-ubuntu2204-base")
    assert [item["state"] for item in gcloud("tpu-vm", "list")] == ["READY"]
    gcloud("tpu-vm", "stop", "n")
    described = gcloud("tpu-vm", "describe", "n")
    assert (described["state"], described["acceleratorConfig"]) == ("STOPPED", {"type": "V4", "topology": "2x2x2"})
    gcloud("tpu-vm", "start", "n")
    gcloud("tpu-vm", "delete", "n")
    assert gcloud("tpu-vm", "list") == []


def test_gcloud_creates_lists_describes_and_deletes_a_queued_resource(gcloud: Gcloud) -> None:
    kind = ("--accelerator-type", "v4-16", "--runtime-version", "tpu-ubuntu2204-base")
    gcloud("queued-resources", "create", "q", "--node-id", "n", "--spot", "--valid-until-duration", "1h", *kind)
    assert [item["state"]["state"] for item in gcloud("queued-resources", "list")] == ["ACTIVE"]
    described = gcloud("queued-resources", "describe", "q")
    assert (described["spot"], described["tpu"]["nodeSpec"][0]["nodeId"]) == ({}, "n")
    gcloud("queued-resources", "delete", "q", "--force")
    assert gcloud("queued-resources", "list") == []


def test_gcloud_lists_accelerator_types(gcloud: Gcloud) -> None:
    assert f"{PARENT}/acceleratorTypes/v6e-256" in {item["name"] for item in gcloud("accelerator-types", "list")}
