"""Every method of the emulated service as one table, whatever carries the call: gRPC and REST serve the same handlers.

Requests and answers are raw protobuf messages. A method that is not in the table is not implemented.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import google_crc32c

from cluster.emulator import catalogue
from cluster.emulator.cloud import Cloud
from cluster.emulator.faults import ON_CALL, Effect

TPU, OPERATIONS, LOCATIONS = "google.cloud.tpu.v2.Tpu", "google.longrunning.Operations", "google.cloud.location.Locations"
SECRETS = "google.cloud.secretmanager.v1.SecretManagerService"
SERVICES = (TPU, OPERATIONS, LOCATIONS, SECRETS)
T = TypeVar("T")
_LISTS = frozenset(
    {
        "ListNodes",
        "ListQueuedResources",
        "ListLocations",
        "GetLocation",
        "ListOperations",
        "GetOperation",
        "instances.aggregatedList",
        "zoneOperations.get",
        "zoneOperations.wait",
    }
)
"""Answered also where a zone is unreachable: lists name it instead, and operations are not of the zone."""


class Dropped(Exception):
    """The connection of a call breaks."""


@dataclass(frozen=True)
class Method:
    """One method of one service."""

    service: str
    name: str
    request: Any
    """The raw protobuf class of its request."""
    handle: Callable[[Any], Any]


class Api:
    """The methods of one cloud, and what every call goes through."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        tpu = [*_node_methods(cloud), *_queued_methods(cloud), *_catalogue_methods()]
        found = [*tpu, *_operation_methods(cloud), *_location_methods(), *_secret_methods(cloud)]
        self.methods = {method.name: method for method in found}

    def call(self, name: str, request: Any) -> Any:
        """The answer to a raw request. Raises Refusal, and Dropped where a fault breaks the connection."""
        return self.guard(name, target_of(request), lambda: self.methods[name].handle(request))

    def guard(self, name: str, target: str, handle: Callable[[], T]) -> T:
        """What every call goes through, whatever its service. Raises Refusal, and Dropped where a fault breaks the connection."""
        struck = self._cloud.faults.strike(name, target, ON_CALL)
        for fault in struck:
            if fault.effect is Effect.LATENCY:
                self._cloud.clock.sleep(fault.seconds)
            elif fault.effect is Effect.ERROR:
                raise fault.refusal(name, target)
            elif fault.effect is Effect.DROP:
                raise Dropped
        if name not in _LISTS:
            self._cloud.check_reachable(zone_of(target))
        answer = handle()
        if any(fault.effect is Effect.DROP_ANSWER for fault in struck):
            raise Dropped
        return answer


def target_of(request: Any) -> str:
    """The resource that a raw request is about: for a creation the one to be, for a list its parent, and for a later page of one
    `<parent>/pages/<id that the page before it ended with>`.
    """
    fields = request.DESCRIPTOR.fields_by_name
    if "name" in fields:
        return str(request.name)
    if "parent" not in fields:
        return str(request.node.name)
    for field, collection in (("node_id", "nodes"), ("queued_resource_id", "queuedResources"), ("secret_id", "secrets")):
        if field in fields:
            return f"{request.parent}/{collection}/{getattr(request, field)}"
    if "page_token" in fields and request.page_token:
        return f"{request.parent}/pages/{request.page_token.rpartition('/')[2]}"
    return str(request.parent)


def zone_of(target: str) -> str:
    """The zone of a resource's path, or empty."""
    parts = target.split("/")
    return parts[3] if len(parts) > 3 and parts[2] in ("locations", "zones") else ""


def _node_methods(cloud: Cloud) -> list[Method]:
    from google.cloud import tpu_v2

    def list_nodes(call: Any) -> Any:
        page, token = cloud.list_nodes(call.parent, call.page_size, call.page_token)
        response = tpu_v2.ListNodesResponse.pb()(next_page_token=token, unreachable=cloud.unreachable(call.parent))
        for message in page:
            response.nodes.add().MergeFromString(message)
        return response

    def guest_attributes(call: Any) -> Any:
        response = tpu_v2.GetGuestAttributesResponse.pb()()
        for found in cloud.guest_attributes(call.name, call.query_path, list(call.worker_ids)):
            one = response.guest_attributes.add(query_path=call.query_path)
            for name, value in found.items():
                namespace, _, key = name.partition("/")
                one.query_value.items.add(namespace=namespace, key=key, value=value)
        return response

    return [
        Method(TPU, "CreateNode", tpu_v2.CreateNodeRequest.pb(), lambda call: cloud.create_node(call.parent, call.node_id, call.node)),
        Method(TPU, "GetNode", tpu_v2.GetNodeRequest.pb(), lambda call: cloud.get_node(call.name)),
        Method(TPU, "ListNodes", tpu_v2.ListNodesRequest.pb(), list_nodes),
        Method(TPU, "DeleteNode", tpu_v2.DeleteNodeRequest.pb(), lambda call: cloud.delete_node(call.name)),
        Method(TPU, "StopNode", tpu_v2.StopNodeRequest.pb(), lambda call: cloud.stop_node(call.name)),
        Method(TPU, "StartNode", tpu_v2.StartNodeRequest.pb(), lambda call: cloud.start_node(call.name)),
        Method(TPU, "UpdateNode", tpu_v2.UpdateNodeRequest.pb(), lambda call: cloud.update_node(call.node, list(call.update_mask.paths))),
        Method(TPU, "GetGuestAttributes", tpu_v2.GetGuestAttributesRequest.pb(), guest_attributes),
    ]


def _queued_methods(cloud: Cloud) -> list[Method]:
    from google.cloud import tpu_v2

    def create(call: Any) -> Any:
        return cloud.queued.create(call.parent, call.queued_resource_id, call.queued_resource, call.request_id)

    def list_page(call: Any) -> Any:
        page, token = cloud.queued.list_page(call.parent, call.page_size, call.page_token)
        response = tpu_v2.ListQueuedResourcesResponse.pb()(next_page_token=token, unreachable=cloud.unreachable(call.parent))
        for message in page:
            response.queued_resources.add().MergeFromString(message)
        return response

    def delete(call: Any) -> Any:
        return cloud.queued.delete(call.name, force=call.force, request_id=call.request_id)

    return [
        Method(TPU, "CreateQueuedResource", tpu_v2.CreateQueuedResourceRequest.pb(), create),
        Method(TPU, "GetQueuedResource", tpu_v2.GetQueuedResourceRequest.pb(), lambda call: cloud.queued.get(call.name)),
        Method(TPU, "ListQueuedResources", tpu_v2.ListQueuedResourcesRequest.pb(), list_page),
        Method(TPU, "DeleteQueuedResource", tpu_v2.DeleteQueuedResourceRequest.pb(), delete),
        Method(TPU, "ResetQueuedResource", tpu_v2.ResetQueuedResourceRequest.pb(), lambda call: cloud.queued.reset(call.name)),
    ]


def _catalogue_methods() -> list[Method]:
    from google.cloud import tpu_v2

    return [
        Method(TPU, "ListAcceleratorTypes", tpu_v2.ListAcceleratorTypesRequest.pb(), catalogue.list_accelerator_types),
        Method(TPU, "GetAcceleratorType", tpu_v2.GetAcceleratorTypeRequest.pb(), lambda call: catalogue.get_accelerator_type(call.name)),
        Method(TPU, "ListRuntimeVersions", tpu_v2.ListRuntimeVersionsRequest.pb(), catalogue.list_runtime_versions),
        Method(TPU, "GetRuntimeVersion", tpu_v2.GetRuntimeVersionRequest.pb(), lambda call: catalogue.get_runtime_version(call.name)),
        Method(
            TPU, "GenerateServiceIdentity", tpu_v2.GenerateServiceIdentityRequest.pb(), lambda call: catalogue.service_identity(call.parent)
        ),
    ]


def _operation_methods(cloud: Cloud) -> list[Method]:
    from google.longrunning import operations_pb2
    from google.protobuf import empty_pb2

    def list_operations(call: Any) -> Any:
        return operations_pb2.ListOperationsResponse(operations=cloud.list_operations(call.name))

    def delete_operation(call: Any) -> Any:
        cloud.delete_operation(call.name)
        return empty_pb2.Empty()

    def cancel_operation(call: Any) -> Any:
        cloud.cancel_operation(call.name)
        return empty_pb2.Empty()

    return [
        Method(OPERATIONS, "GetOperation", operations_pb2.GetOperationRequest, lambda call: cloud.get_operation(call.name)),
        Method(OPERATIONS, "ListOperations", operations_pb2.ListOperationsRequest, list_operations),
        Method(OPERATIONS, "DeleteOperation", operations_pb2.DeleteOperationRequest, delete_operation),
        Method(OPERATIONS, "CancelOperation", operations_pb2.CancelOperationRequest, cancel_operation),
    ]


def _location_methods() -> list[Method]:
    from google.cloud.location import locations_pb2

    return [
        Method(LOCATIONS, "ListLocations", locations_pb2.ListLocationsRequest, lambda call: catalogue.list_locations(call.name)),
        Method(LOCATIONS, "GetLocation", locations_pb2.GetLocationRequest, lambda call: catalogue.get_location(call.name)),
    ]


def _secret_methods(cloud: Cloud) -> list[Method]:
    from google.cloud import secretmanager_v1 as api
    from google.protobuf import empty_pb2

    secrets = cloud.secrets

    def create(call: Any) -> Any:
        return secrets.create(call.parent, call.secret_id, call.secret)

    def list_secrets(call: Any) -> Any:
        page, token, total = secrets.list_page(call.parent, call.filter, call.page_size, call.page_token)
        return api.ListSecretsResponse.pb()(secrets=page, next_page_token=token, total_size=total)

    def list_versions(call: Any) -> Any:
        page, token, total = secrets.list_versions(call.parent, call.page_size, call.page_token)
        return api.ListSecretVersionsResponse.pb()(versions=page, next_page_token=token, total_size=total)

    def delete(call: Any) -> Any:
        secrets.delete(call.name)
        return empty_pb2.Empty()

    def access(call: Any) -> Any:
        name, data = secrets.access(call.name)
        return api.AccessSecretVersionResponse.pb()(name=name, payload={"data": data, "data_crc32c": google_crc32c.value(data)})

    return [
        Method(SECRETS, "CreateSecret", api.CreateSecretRequest.pb(), create),
        Method(SECRETS, "GetSecret", api.GetSecretRequest.pb(), lambda call: secrets.get(call.name)),
        Method(SECRETS, "ListSecrets", api.ListSecretsRequest.pb(), list_secrets),
        Method(SECRETS, "DeleteSecret", api.DeleteSecretRequest.pb(), delete),
        Method(SECRETS, "AddSecretVersion", api.AddSecretVersionRequest.pb(), lambda call: secrets.add_version(call.parent, call.payload)),
        Method(SECRETS, "ListSecretVersions", api.ListSecretVersionsRequest.pb(), list_versions),
        Method(SECRETS, "GetSecretVersion", api.GetSecretVersionRequest.pb(), lambda call: secrets.get_version(call.name)),
        Method(SECRETS, "AccessSecretVersion", api.AccessSecretVersionRequest.pb(), access),
        Method(SECRETS, "DestroySecretVersion", api.DestroySecretVersionRequest.pb(), lambda call: secrets.destroy(call.name)),
    ]
