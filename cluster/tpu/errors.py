"""What the Cloud TPU service refuses, in the words of the service and with the next thing to do.

TPUError
├── QuotaError             a quota is used up; only a higher quota or fewer chips help
├── StockoutError          the zone has no capacity now; another zone may
├── ReservationError       the reservation has no capacity left
├── PermissionDeniedError  this identity may not do that
├── CredentialsError       there is no identity: no credentials, or none that Google accepts
├── ApiDisabledError       the Cloud TPU API is off in the project
├── NotInZoneError         the zone lacks that accelerator type, or is closed to the project; it will stay so
├── InvalidRequestError    the service does not accept the request as it is
│   └── InvalidRuntimeVersionError
├── AlreadyExistsError     the name is taken, perhaps by a node that is being deleted
├── NotFoundError          there is no such resource
├── PreemptedError         the slice was taken back
├── RateLimitedError       too many requests a minute
├── TransientError         the service stumbled; the same request may succeed later
├── DeadlineExceededError  no answer in time; what was asked for may have happened
└── UnknownError           anything else, in the service's words

Sources of the texts: section "Errors seen in the wild" of the API fact sheet, collected from public issues and run logs.
"""

import re
from dataclasses import dataclass
from typing import Any

from cluster.errors import PodlaunchError

# google.rpc.Code
_INVALID_ARGUMENT, _DEADLINE_EXCEEDED, _NOT_FOUND, _ALREADY_EXISTS, _PERMISSION_DENIED = 3, 4, 5, 6, 7
_RESOURCE_EXHAUSTED, _FAILED_PRECONDITION, _ABORTED, _OUT_OF_RANGE, _INTERNAL, _UNAVAILABLE, _UNAUTHENTICATED = 8, 9, 10, 11, 13, 14, 16


class TPUError(PodlaunchError):
    """The Cloud TPU service refused or failed. One line: what, which resource, where, the service's words, what to do next."""

    summary = "the Cloud TPU service refused the request"
    next_step = "look at the service's words"
    another_zone_may_help = False
    """Whether the refusal concerns one zone only, so that the same request in another one makes sense."""

    def __init__(
        self, words: str, *, resource: str, zone: str | None = None, code: int | None = None, next_step: str | None = None
    ) -> None:
        self.words = _one_line(words)
        """What the service said."""
        self.resource = resource
        self.zone = zone
        self.code = code
        """google.rpc.Code, where known."""
        place = f"{resource} in {'all zones' if zone == '-' else zone}" if zone else resource
        super().__init__(f"{place}: {self.summary}: {self.words or 'no reason given'}; {next_step or self.next_step}")


class QuotaError(TPUError):
    summary = "quota used up"
    next_step = "ask for more quota (console: IAM & Admin > Quotas, service tpu.googleapis.com), or use a smaller type or another region"
    another_zone_may_help = True

    @property
    def blocked_place(self) -> str | None:
        """The region or zone that the quota counts for, as far as the words tell."""
        found = re.search(r"in (?:region|zone) ([a-z]+-[a-z]+[0-9]+(?:-[a-z])?)", self.words)
        return found.group(1) if found else None


class StockoutError(TPUError):
    summary = "no capacity"
    next_step = "add zones to the configuration, try again later, or use spot or another accelerator type"
    another_zone_may_help = True


class ReservationError(TPUError):
    summary = "no reserved capacity"
    next_step = "check the reservation's size and zone, or use provisioning=on-demand or spot"
    another_zone_may_help = True


class PermissionDeniedError(TPUError):
    summary = "permission denied"
    next_step = "grant roles/tpu.admin to this identity, or log in as another (gcloud auth application-default login)"


class CredentialsError(TPUError):
    summary = "no usable credentials"
    next_step = "run: gcloud auth application-default login, or let GOOGLE_APPLICATION_CREDENTIALS name a service account's key file"


class ApiDisabledError(TPUError):
    summary = "the Cloud TPU API is disabled"
    next_step = "run: gcloud services enable tpu.googleapis.com"


class NotInZoneError(TPUError):
    exit_code = 2
    summary = "not available in this zone"
    next_step = "choose another zone, or a type that this one has (gcloud compute tpus accelerator-types list --zone ZONE)"
    another_zone_may_help = True


class InvalidRequestError(TPUError):
    exit_code = 2
    summary = "the service does not accept the request"
    next_step = "correct the setting that it names"


class InvalidRuntimeVersionError(InvalidRequestError):
    summary = "unknown runtime version"
    next_step = "leave runtime_version out to get the catalogue's, or choose one of: gcloud compute tpus tpu-vm versions list --zone ZONE"


class AlreadyExistsError(TPUError):
    summary = "the name is taken"
    next_step = "wait until a deletion under way is done, or choose another cluster name"


class NotFoundError(TPUError):
    summary = "does not exist"
    next_step = "list what exists: gcloud compute tpus tpu-vm list --zone ZONE"


class PreemptedError(TPUError):
    summary = "preempted"
    next_step = "create it again, in another zone if this goes on"
    another_zone_may_help = True


class RateLimitedError(TPUError):
    summary = "too many requests"
    next_step = "wait half a minute and try again"


class TransientError(TPUError):
    summary = "the service stumbled"
    next_step = "try again"
    # Code 13 at the end of a creation is how a stockout of spot capacity has shown itself.
    another_zone_may_help = True


class DeadlineExceededError(TPUError):
    summary = "no answer in time"
    next_step = "look at its state before trying again: it may have happened"


class UnknownError(TPUError):
    summary = "unexpected answer"
    next_step = "look at the resource's state, then try again or report it with these words"
    another_zone_may_help = True


REFUSALS = (StockoutError, QuotaError, ReservationError, NotInZoneError)
"""What says for certain that a zone makes no slice now; after any other error the slice may be there, so no other zone is asked at once."""


@dataclass(frozen=True)
class _Rule:
    pattern: str
    error: type[TPUError]
    next_step: str | None = None


# The first rule whose pattern occurs in the words wins, then the code decides: the same code stands for very different things
# (8: quota, stockout, rate, and even a client's own receive limit).
_BY_WORDS = (
    _Rule(
        r"received message larger than max",
        UnknownError,
        "raise grpc.max_receive_message_length of the channel: this is the client's limit, not the service's",
    ),
    _Rule(r"no more capacity in the zone", StockoutError),
    _Rule(r"insufficient reserved capacity", ReservationError),
    _Rule(r"requests per minute|rate.?limit", RateLimitedError),
    _Rule(r"quota limit '|quota '[^']*' exhausted", QuotaError),
    _Rule(r"while in state PREEMPTED", PreemptedError),
    _Rule(r"could not be found in the zonal accelerator configurations", NotInZoneError),
    _Rule(r"the accelerator \S+ was not found in zone", NotInZoneError),
    _Rule(r"received an invalid AcceleratorType", NotInZoneError),
    _Rule(r"LOCATION_POLICY_VIOLATED|Permission denied on 'locations/", NotInZoneError),
    _Rule(r"Location \S+ is not found or access is unauthorized", NotInZoneError),
    _Rule(r'"Runtime.?Version" value|runtime.?version', InvalidRuntimeVersionError),
    _Rule(r"has not been used in project|SERVICE_DISABLED", ApiDisabledError),
    _Rule(r"free-trial billing account", PermissionDeniedError, "upgrade the billing account to a paid one"),
    # What google-auth says inside an UNAVAILABLE when a token is refused; a network that fails there reads differently and may pass.
    _Rule(r"invalid_grant|invalid_client|unauthorized_client|account_not_found", CredentialsError),
    _Rule(r"migrate to TPU VM Architecture", InvalidRequestError, "use the v2 API's TPU VMs"),
)
_BY_CODE: dict[int, type[TPUError]] = {
    _INVALID_ARGUMENT: InvalidRequestError,
    _DEADLINE_EXCEEDED: DeadlineExceededError,
    _NOT_FOUND: NotFoundError,
    _ALREADY_EXISTS: AlreadyExistsError,
    _PERMISSION_DENIED: PermissionDeniedError,
    _RESOURCE_EXHAUSTED: QuotaError,
    _FAILED_PRECONDITION: InvalidRequestError,
    _ABORTED: TransientError,
    _OUT_OF_RANGE: InvalidRequestError,
    _INTERNAL: TransientError,
    _UNAVAILABLE: TransientError,
    _UNAUTHENTICATED: CredentialsError,
}
# REST answers carry no rpc code; 429 without one is a rate, not a quota.
_CODE_OF_HTTP = {400: 3, 401: 16, 403: 7, 404: 5, 409: 6, 412: 9, 500: 13, 502: 14, 503: 14, 504: 4}


def classify(code: int | None, words: str, *, resource: str, zone: str | None = None, operation: bool = False) -> TPUError:
    """The error for a google.rpc.Code and the service's words.

    `operation` says that it is the end of a long-running operation: there an unexplained code 8 means that capacity ran out.
    """
    for rule in _BY_WORDS:
        if re.search(rule.pattern, words, re.IGNORECASE):
            return rule.error(words, resource=resource, zone=zone, code=code, next_step=rule.next_step)
    if operation and code == _RESOURCE_EXHAUSTED:
        return StockoutError(words, resource=resource, zone=zone, code=code)
    return _BY_CODE.get(code or 0, UnknownError)(words, resource=resource, zone=zone, code=code)


def from_status(status: Any, *, resource: str, zone: str | None = None) -> TPUError:
    """The error for a google.rpc.Status, as a long-running operation ends with."""
    words = " ".join((status.message, *_typed_details(status.details)))
    return classify(int(status.code), words, resource=resource, zone=zone, operation=True)


def from_exception(error: Exception, *, resource: str, zone: str | None = None) -> TPUError:
    """The error for an exception of google-api-core (calls and operations, sync and async), google-auth, or a plain TimeoutError."""
    from google.api_core import exceptions as core  # only here: whoever has such an exception has paid for the import
    from google.auth.exceptions import GoogleAuthError

    if isinstance(error, core.RetryError) and isinstance(error.cause, Exception):
        return from_exception(error.cause, resource=resource, zone=zone)
    if isinstance(error, GoogleAuthError):
        return _from_auth(error, resource=resource, zone=zone)
    if isinstance(error, TimeoutError):
        return DeadlineExceededError(str(error), resource=resource, zone=zone, code=_DEADLINE_EXCEEDED)
    if not isinstance(error, core.GoogleAPICallError):
        return UnknownError(f"{type(error).__name__}: {error}", resource=resource, zone=zone)
    code = _rpc_code(error)
    if code is None and error.code == 429:
        return RateLimitedError(str(error.message), resource=resource, zone=zone)
    words = " ".join((str(error.message), *_typed_details(error.details), error.reason or ""))
    return classify(code, words, resource=resource, zone=zone, operation=_from_operation(error))


def _from_auth(error: Exception, *, resource: str, zone: str | None) -> TPUError:
    """What google-auth raises carries the words first and what it came from behind; a network that fails may come back."""
    words = str(error.args[0]) if error.args else str(error)
    if getattr(error, "retryable", False):
        return TransientError(words, resource=resource, zone=zone, code=_UNAVAILABLE)
    return CredentialsError(words, resource=resource, zone=zone, code=_UNAUTHENTICATED)


def _rpc_code(error: Any) -> int | None:
    """google.rpc.Code of a GoogleAPICallError. What an async operation raises carries it only in the status it wraps."""
    if error.grpc_status_code is not None:
        return int(error.grpc_status_code.value[0])
    for part in error.errors:
        code = getattr(part, "code", None)
        if isinstance(code, int):
            return code
    return _CODE_OF_HTTP.get(int(error.code)) if error.code is not None else None


def _from_operation(error: Any) -> bool:
    """Whether a long-running operation ended with it: then the evidence is a google.rpc.Status, else it is the call."""
    return any(isinstance(getattr(part, "code", None), int) for part in error.errors)


def _typed_details(details: Any) -> list[str]:
    """The words inside google.rpc.QuotaFailure and ErrorInfo, packed in Any or already typed; other kinds say nothing that we use."""
    from google.rpc import error_details_pb2

    words: list[str] = []
    for detail in details:
        for kind in (error_details_pb2.QuotaFailure, error_details_pb2.ErrorInfo):
            message = detail if isinstance(detail, kind) else kind()
            if message is not detail and not (hasattr(detail, "Unpack") and detail.Unpack(message)):
                continue
            if isinstance(message, error_details_pb2.QuotaFailure):
                words += [violation.description for violation in message.violations]
            else:
                words.append(message.reason)
    return words


def _one_line(words: str) -> str:
    """Without line breaks, without the service's internal error id and without a final full stop."""
    plain = re.sub(r"\s*\[EID: [^\]]*\]", "", " ".join(words.split()))
    return plain.strip().removesuffix(".")
