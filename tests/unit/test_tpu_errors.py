"""Every text that the Cloud TPU service is known to send, and what it becomes."""

from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import google.api_core.exceptions
import google.auth.exceptions
import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2

from cluster.tpu import errors
from cluster.tpu.errors import TPUError, from_exception, from_status

# Google leaves these without types.
core: Any = google.api_core.exceptions
auth: Any = google.auth.exceptions

TEXTS: list[tuple[int, str, type[TPUError]]] = [
    (
        8,
        'There is no more capacity in the zone "us-central1-c"; you can try in another zone where Cloud TPU Nodes are offered '
        "(see https://cloud.google.com/tpu/docs/regions) [EID: 0x1a2b]",
        errors.StockoutError,
    ),
    (8, "Insufficient reserved capacity. Contact customer support to increase your reservation. [EID: 0x1]", errors.ReservationError),
    (9, "Insufficient reserved capacity. Contact customer support to increase your reservation. [EID: 0x1]", errors.ReservationError),
    (8, "Quota limit 'TPUV6EPreemptiblePerProjectPerRegionForTPUAPI' has been exceeded. Limit: 0 in region us-east5.", errors.QuotaError),
    (8, "Quota 'TPUV4sPreemptiblePodPerProjectPerRegionForTPUAPI' exhausted. Limit 20800 in region us-central2", errors.QuotaError),
    (8, "Maximum number of CreateNode requests per minute", errors.RateLimitedError),
    (13, "an internal error has occurred", errors.TransientError),
    (3, "Cloud TPU received a bad request. update is not supported while in state PREEMPTED [EID: 0x2]", errors.PreemptedError),
    (
        3,
        'Cloud TPU received a bad request. The requested accelerator configuration for accelerator type, "v5litepod-8", could not be found '
        'in the zonal accelerator configurations for "us-central1-b".; the accelerator v5litepod-8 was not found in zone us-central1-b '
        "[EID: 0x3]",
        errors.NotInZoneError,
    ),
    (3, "the accelerator v5litepod-8 was not found in zone us-central1-b", errors.NotInZoneError),
    (
        3,
        'CloudTpu received an invalid AcceleratorType, "v3-8" for zone "us-central1-c". Valid values are "v2-8, ".',
        errors.NotInZoneError,
    ),
    (3, 'Cloud TPU received an invalid argument. The "GuestAttributes" value "" was not found.', errors.InvalidRequestError),
    (
        3,
        'Cloud TPU received an invalid argument. The "runtimeVersion" value "tpu-vm-none" was not found.',
        errors.InvalidRuntimeVersionError,
    ),
    (7, "Permission denied on 'locations/us-central2-b' (or it may not exist).", errors.NotInZoneError),
    (7, "Location us-east1-d is not found or access is unauthorized.", errors.NotInZoneError),
    (7, "Permission 'tpu.nodes.get' denied on 'projects/P/locations/us-central1-b/nodes/N'", errors.PermissionDeniedError),
    (
        7,
        "Cloud TPU API has not been used in project 42 before or it is disabled. Enable it by visiting "
        "https://console.developers.google.com/apis/api/tpu.googleapis.com/overview?project=42 then retry.",
        errors.ApiDisabledError,
    ),
    (7, "cannot create a TPU Node on a project linked to a free-trial billing account", errors.PermissionDeniedError),
    (6, "Resource 'projects/P/locations/Z/nodes/N' already exists", errors.AlreadyExistsError),
    (
        9,
        "Your request to provision TPU Node has been denied. Please migrate to TPU VM Architecture",
        errors.InvalidRequestError,
    ),
    (5, "Resource 'projects/P/locations/Z/nodes/N' was not found", errors.NotFoundError),
    (8, "CLIENT: Received message larger than max (5000000 vs. 4194304)", errors.UnknownError),
    (14, "failed to connect to all addresses", errors.TransientError),
    (4, "Deadline Exceeded", errors.DeadlineExceededError),
    (2, "something new", errors.UnknownError),
]


@pytest.mark.parametrize(("code", "text", "expected"), TEXTS)
def test_known_text_gives_the_same_error_by_every_way(code: int, text: str, expected: type[TPUError]) -> None:
    status = status_pb2.Status(code=code, message=text)
    by_call = core.from_grpc_status(_grpc_code(code), text)
    by_operation = core.from_grpc_status(code, text, errors=(status,), response=status)
    # What an async operation raises: unmapped, the code only in the status that it wraps.
    by_async_operation = core.GoogleAPICallError(text, errors=(status,), response=status)
    found = [
        from_status(status, resource="mine-0", zone="us-central1-c"),
        *(from_exception(error, resource="mine-0", zone="us-central1-c") for error in (by_call, by_operation, by_async_operation)),
    ]
    assert [type(error) for error in found] == [expected] * 4
    for error in found:
        assert str(error).startswith("mine-0 in us-central1-c: ")
        assert "\n" not in str(error)
        assert "EID" not in str(error)
        assert error.code == code


def test_quota_words_tell_the_blocked_region() -> None:
    error = from_status(status_pb2.Status(code=8, message=TEXTS[3][1]), resource="mine-0")
    assert isinstance(error, errors.QuotaError)
    assert error.blocked_place == "us-east5"


def test_quota_words_only_in_the_details_are_found() -> None:
    failure = error_details_pb2.QuotaFailure()
    failure.violations.add(description=TEXTS[4][1])
    packed = AnyMessage()
    packed.Pack(failure)
    status = status_pb2.Status(code=8, message="refused", details=[packed])
    assert type(from_status(status, resource="mine-0")) is errors.QuotaError
    raised = core.ResourceExhausted("refused", details=[failure])
    assert "TPUV4sPreemptiblePod" in str(from_exception(raised, resource="mine-0"))


def test_location_policy_reason_in_the_details_closes_the_zone() -> None:
    info = error_details_pb2.ErrorInfo(reason="LOCATION_POLICY_VIOLATED")
    raised = core.PermissionDenied("no", details=[info], error_info=info)
    assert type(from_exception(raised, resource="mine-0")) is errors.NotInZoneError


def test_unexplained_code_8_is_a_stockout_at_an_operations_end_and_quota_at_a_call() -> None:
    assert type(from_status(status_pb2.Status(code=8, message="?"), resource="r")) is errors.StockoutError
    assert type(from_exception(core.ResourceExhausted("?"), resource="r")) is errors.QuotaError


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (core.TooManyRequests("slow down"), errors.RateLimitedError),  # REST: no rpc code
        (core.from_http_status(503, "busy"), errors.TransientError),
        (core.RetryError("gave up", cause=core.ServiceUnavailable("down")), errors.TransientError),
        (FutureTimeout(), errors.DeadlineExceededError),
        (auth.DefaultCredentialsError("none found"), errors.CredentialsError),
        (auth.RefreshError("invalid_grant: no such account", {}, retryable=False), errors.CredentialsError),
        (auth.TransportError("no route", retryable=True), errors.TransientError),
        (core.ServiceUnavailable("Getting metadata from plugin failed with error: ('invalid_grant: gone', {})"), errors.CredentialsError),
        (ValueError("odd"), errors.UnknownError),
    ],
)
def test_other_exceptions_are_classified_too(raised: Exception, expected: type[TPUError]) -> None:
    assert type(from_exception(raised, resource="mine-0")) is expected


def _grpc_code(number: int) -> Any:
    return next(code for code in grpc.StatusCode if code.value[0] == number)
