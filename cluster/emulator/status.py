"""A refusal as Google's services word it: google.rpc.Status."""

from typing import Any

from cluster.emulator.model import Refusal


def status_of(refusal: Refusal) -> Any:
    """As a raw google.rpc.Status, details packed."""
    from google.protobuf import any_pb2
    from google.rpc import status_pb2

    status = status_pb2.Status(code=refusal.code, message=refusal.words)
    for detail in refusal.details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status
