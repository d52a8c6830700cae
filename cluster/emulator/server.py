"""The Cloud TPU v2 API over gRPC, as the unmodified client speaks it, in front of a Cloud."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_status import rpc_status

from cluster.emulator.checks import check_parent, not_found, runtime_versions
from cluster.emulator.cloud import Cloud
from cluster.emulator.model import Refusal
from cluster.emulator.peers import Peers
from cluster.tpu import catalog

_WORKERS = 16


class Server:
    """Serves `cloud` on 127.0.0.1 from the moment it is made until `stop`."""

    def __init__(self, cloud: Cloud, port: int = 0) -> None:
        """`port`: 0 for any free one. One that is taken is given up for a free one."""
        # Without so_reuseport=0 two servers would share a port and each would answer half of the calls.
        self._server = grpc.server(ThreadPoolExecutor(_WORKERS, thread_name_prefix="grpc"), options=[("grpc.so_reuseport", 0)])
        self.port = self._bind(port)
        peers = Peers(self.port)
        self._server.add_generic_rpc_handlers((_tpu_handlers(cloud, peers), _operation_handlers(cloud, peers)))
        self._server.start()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self, grace: float = 1.0) -> None:
        """Stop serving; calls under way have `grace` seconds."""
        self._server.stop(grace).wait()

    def _bind(self, port: int) -> int:
        try:
            return int(self._server.add_insecure_port(f"127.0.0.1:{port}"))
        except RuntimeError:
            return int(self._server.add_insecure_port("127.0.0.1:0"))


def _tpu_handlers(cloud: Cloud, peers: Peers) -> Any:
    from google.cloud import tpu_v2

    def create_node(call: Any) -> Any:
        return cloud.create_node(call.parent, call.node_id, call.node)

    def get_node(call: Any) -> Any:
        return cloud.get_node(call.name)

    def list_nodes(call: Any) -> Any:
        page, token = cloud.list_nodes(call.parent, call.page_size, call.page_token)
        response = tpu_v2.ListNodesResponse.pb()(next_page_token=token, unreachable=cloud.unreachable(call.parent))
        for message in page:
            response.nodes.add().MergeFromString(message)
        return response

    def delete_node(call: Any) -> Any:
        return cloud.delete_node(call.name)

    def stop_node(call: Any) -> Any:
        return cloud.stop_node(call.name)

    def start_node(call: Any) -> Any:
        return cloud.start_node(call.name)

    def update_node(call: Any) -> Any:
        return cloud.update_node(call.node, list(call.update_mask.paths))

    def create_queued_resource(call: Any) -> Any:
        return cloud.queued.create(call.parent, call.queued_resource_id, call.queued_resource, call.request_id)

    def get_queued_resource(call: Any) -> Any:
        return cloud.queued.get(call.name)

    def list_queued_resources(call: Any) -> Any:
        page, token = cloud.queued.list_page(call.parent, call.page_size, call.page_token)
        response = tpu_v2.ListQueuedResourcesResponse.pb()(next_page_token=token, unreachable=cloud.unreachable(call.parent))
        for message in page:
            response.queued_resources.add().MergeFromString(message)
        return response

    def delete_queued_resource(call: Any) -> Any:
        return cloud.queued.delete(call.name, force=call.force, request_id=call.request_id)

    def reset_queued_resource(call: Any) -> Any:
        return cloud.queued.reset(call.name)

    def list_accelerator_types(call: Any) -> Any:
        check_parent(call.parent)
        kinds = [_accelerator_type(call.parent, kind) for kind in catalog.all_types()]
        return tpu_v2.ListAcceleratorTypesResponse.pb()(accelerator_types=kinds)

    def get_accelerator_type(call: Any) -> Any:
        parent, _, name = call.name.partition("/acceleratorTypes/")
        check_parent(parent)
        if name not in catalog.by_name():
            raise not_found(call.name)
        return _accelerator_type(parent, catalog.by_name()[name])

    def list_runtime_versions(call: Any) -> Any:
        check_parent(call.parent)
        versions = [_runtime_version(call.parent, version) for version in runtime_versions()]
        return tpu_v2.ListRuntimeVersionsResponse.pb()(runtime_versions=versions)

    def get_runtime_version(call: Any) -> Any:
        parent, _, version = call.name.partition("/runtimeVersions/")
        check_parent(parent)
        if version not in runtime_versions():
            raise not_found(call.name)
        return _runtime_version(parent, version)

    def _accelerator_type(parent: str, kind: catalog.AcceleratorType) -> Any:
        return tpu_v2.AcceleratorType.pb()(name=f"{parent}/acceleratorTypes/{kind.name}", type_=kind.name)

    def _runtime_version(parent: str, version: str) -> Any:
        return tpu_v2.RuntimeVersion.pb()(name=f"{parent}/runtimeVersions/{version}", version=version)

    return _handlers(
        peers,
        "google.cloud.tpu.v2.Tpu",
        {
            "CreateNode": (create_node, tpu_v2.CreateNodeRequest.pb()),
            "GetNode": (get_node, tpu_v2.GetNodeRequest.pb()),
            "ListNodes": (list_nodes, tpu_v2.ListNodesRequest.pb()),
            "DeleteNode": (delete_node, tpu_v2.DeleteNodeRequest.pb()),
            "StopNode": (stop_node, tpu_v2.StopNodeRequest.pb()),
            "StartNode": (start_node, tpu_v2.StartNodeRequest.pb()),
            "UpdateNode": (update_node, tpu_v2.UpdateNodeRequest.pb()),
            "CreateQueuedResource": (create_queued_resource, tpu_v2.CreateQueuedResourceRequest.pb()),
            "GetQueuedResource": (get_queued_resource, tpu_v2.GetQueuedResourceRequest.pb()),
            "ListQueuedResources": (list_queued_resources, tpu_v2.ListQueuedResourcesRequest.pb()),
            "DeleteQueuedResource": (delete_queued_resource, tpu_v2.DeleteQueuedResourceRequest.pb()),
            "ResetQueuedResource": (reset_queued_resource, tpu_v2.ResetQueuedResourceRequest.pb()),
            "ListAcceleratorTypes": (list_accelerator_types, tpu_v2.ListAcceleratorTypesRequest.pb()),
            "GetAcceleratorType": (get_accelerator_type, tpu_v2.GetAcceleratorTypeRequest.pb()),
            "ListRuntimeVersions": (list_runtime_versions, tpu_v2.ListRuntimeVersionsRequest.pb()),
            "GetRuntimeVersion": (get_runtime_version, tpu_v2.GetRuntimeVersionRequest.pb()),
        },
    )


def _operation_handlers(cloud: Cloud, peers: Peers) -> Any:
    from google.longrunning import operations_pb2
    from google.protobuf import empty_pb2

    def get_operation(call: Any) -> Any:
        return cloud.get_operation(call.name)

    def list_operations(call: Any) -> Any:
        check_parent(call.name)
        return operations_pb2.ListOperationsResponse(operations=cloud.list_operations(call.name))

    def delete_operation(call: Any) -> Any:
        cloud.delete_operation(call.name)
        return empty_pb2.Empty()

    def cancel_operation(call: Any) -> Any:
        cloud.cancel_operation(call.name)
        return empty_pb2.Empty()

    return _handlers(
        peers,
        "google.longrunning.Operations",
        {
            "GetOperation": (get_operation, operations_pb2.GetOperationRequest),
            "ListOperations": (list_operations, operations_pb2.ListOperationsRequest),
            "DeleteOperation": (delete_operation, operations_pb2.DeleteOperationRequest),
            "CancelOperation": (cancel_operation, operations_pb2.CancelOperationRequest),
        },
    )


def _handlers(peers: Peers, service: str, methods: dict[str, tuple[Callable[[Any], Any], Any]]) -> Any:
    """A generic handler for raw protobuf requests. A method that is left out answers UNIMPLEMENTED."""
    return grpc.method_handlers_generic_handler(
        service,
        {
            name: grpc.unary_unary_rpc_method_handler(
                _answering(handler, peers), request_deserializer=request.FromString, response_serializer=_serialize
            )
            for name, (handler, request) in methods.items()
        },
    )


def _serialize(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def _answering(handler: Callable[[Any], Any], peers: Peers) -> Callable[[Any, Any], Any]:
    def answer(call: Any, context: Any) -> Any:
        if not peers.allowed(context.peer()):
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "this emulated cloud belongs to another user of the machine")
        try:
            return handler(call)
        except Refusal as refusal:
            context.abort_with_status(rpc_status.to_status(status_of(refusal)))

    return answer


def status_of(refusal: Refusal) -> Any:
    """As a raw google.rpc.Status."""
    from google.protobuf import any_pb2
    from google.rpc import status_pb2

    status = status_pb2.Status(code=refusal.code, message=refusal.words)
    for detail in refusal.details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status
