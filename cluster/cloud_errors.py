"""What a Google Cloud service refuses, in the words of the service and with the next thing to do.

CloudError
├── QuotaError             a quota is used up; only a higher quota or fewer chips help
├── StockoutError          the zone has no capacity now; another zone may
├── ReservationError       the reservation has no capacity left
├── PermissionDeniedError  this identity may not do that
├── CredentialsError       there is no identity: no credentials, or none that Google accepts
├── ApiDisabledError       the service's API is off in the project
├── NotInZoneError         the zone lacks that accelerator type, or is closed to the project; it will stay so
├── InvalidRequestError    the service does not accept the request as it is
│   └── InvalidRuntimeVersionError
├── AlreadyExistsError     the name is taken, perhaps by something that is being deleted
├── NotFoundError          there is no such resource
├── PreemptedError         the slice was taken back
├── RateLimitedError       too many requests a minute
├── TransientError         the service stumbled; the same request may succeed later
├── DeadlineExceededError  no answer in time; what was asked for may have happened
└── UnknownError           anything else, in the service's words

The services and the texts that only one of them sends: cluster/tpu/errors.py, cluster/compute.py, cluster/secrets.py.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cluster.errors import PodlaunchError

# google.rpc.Code
_INVALID_ARGUMENT, _DEADLINE_EXCEEDED, _NOT_FOUND, _ALREADY_EXISTS, _PERMISSION_DENIED = 3, 4, 5, 6, 7
_RESOURCE_EXHAUSTED, _FAILED_PRECONDITION, _ABORTED, _OUT_OF_RANGE, _INTERNAL, _UNAVAILABLE, _UNAUTHENTICATED = 8, 9, 10, 11, 13, 14, 16


@dataclass(frozen=True)
class Rule:
    """Words that tell what a refusal is, whatever its code."""

    pattern: str
    error: "type[CloudError]"
    next_step: str | None = None


@dataclass(frozen=True)
class Service:
    """One service: what its errors call it, and what helps with it."""

    name: str
    api: str
    """As `gcloud services enable` takes it."""
    role: str
    """The role that lets an identity do all that we do."""
    next_steps: "Mapping[type[CloudError], str]" = field(default_factory=dict)
    """Where it knows more than the error itself."""
    rules: tuple[Rule, ...] = ()
    """Tried before those that all services share."""


UNNAMED = Service("the service", "its API", "a role that allows it")
"""For what we say of a resource by ourselves."""


class CloudError(PodlaunchError):
    """A service refused or failed. One line: what, which resource, where, the service's words, what to do next."""

    summary: ClassVar[str] = "{name} refused the request"
    next_step: ClassVar[str] = "look at the service's words"
    """In both, {name}, {api} and {role} of the service are filled in."""
    another_zone_may_help: ClassVar[bool] = False
    """Whether the refusal concerns one zone only, so that the same request in another one makes sense."""

    def __init__(
        self,
        words: str,
        *,
        resource: str,
        zone: str | None = None,
        code: int | None = None,
        service: Service = UNNAMED,
        next_step: str | None = None,
    ) -> None:
        self.words = _one_line(words)
        """What the service said."""
        self.service = service
        self.resource = resource
        self.zone = zone
        self.code = code
        """google.rpc.Code, where known."""
        place = f"{resource} in {'all zones' if zone == '-' else zone}" if zone else resource
        step = next_step or service.next_steps.get(type(self), self.next_step)
        summary, step = (text.format(name=service.name, api=service.api, role=service.role) for text in (self.summary, step))
        super().__init__(f"{place}: {summary}: {self.words or 'no reason given'}; {step}")


class QuotaError(CloudError):
    summary = "quota used up"
    next_step = "ask for more quota (console: IAM & Admin > Quotas, service {api}), or use a smaller type or another region"
    another_zone_may_help = True

    @property
    def blocked_place(self) -> str | None:
        """The region or zone that the quota counts for, as far as the words tell."""
        found = re.search(r"in (?:region|zone) ([a-z]+-[a-z]+[0-9]+(?:-[a-z])?)", self.words)
        return found.group(1) if found else None


class StockoutError(CloudError):
    summary = "no capacity"
    next_step = "add zones to the configuration, try again later, or use spot or another accelerator type"
    another_zone_may_help = True


class ReservationError(CloudError):
    summary = "no reserved capacity"
    next_step = "check the reservation's size and zone, or use provisioning=on-demand or spot"
    another_zone_may_help = True


class PermissionDeniedError(CloudError):
    summary = "permission denied"
    next_step = "grant {role} to this identity, or log in as another (gcloud auth application-default login)"


class CredentialsError(CloudError):
    summary = "no usable credentials"
    next_step = "run: gcloud auth application-default login, or let GOOGLE_APPLICATION_CREDENTIALS name a service account's key file"


class ApiDisabledError(CloudError):
    summary = "the {name} API is disabled"
    next_step = "run: gcloud services enable {api}"


class NotInZoneError(CloudError):
    exit_code = 2
    summary = "not available in this zone"
    next_step = "choose another zone"
    another_zone_may_help = True


class InvalidRequestError(CloudError):
    exit_code = 2
    summary = "the service does not accept the request"
    next_step = "correct the setting that it names"


class InvalidRuntimeVersionError(InvalidRequestError):
    summary = "unknown runtime version"
    next_step = "leave runtime_version out to get the catalogue's, or choose one of: gcloud compute tpus tpu-vm versions list --zone ZONE"


class AlreadyExistsError(CloudError):
    summary = "the name is taken"
    next_step = "wait until a deletion under way is done, or choose another cluster name"


class NotFoundError(CloudError):
    summary = "does not exist"
    next_step = "look at what exists"


class PreemptedError(CloudError):
    summary = "preempted"
    next_step = "create it again, in another zone if this goes on"
    another_zone_may_help = True


class RateLimitedError(CloudError):
    summary = "too many requests"
    next_step = "wait half a minute and try again"


class TransientError(CloudError):
    summary = "the service stumbled"
    next_step = "try again"
    # Code 13 at the end of a creation is how a stockout of spot capacity has shown itself.
    another_zone_may_help = True


class DeadlineExceededError(CloudError):
    summary = "no answer in time"
    next_step = "look at its state before trying again: it may have happened"


class UnknownError(CloudError):
    summary = "unexpected answer"
    next_step = "look at the resource's state, then try again or report it with these words"
    another_zone_may_help = True


# The first rule whose pattern occurs in the words wins, then the code decides: the same code stands for very different things
# (8: quota, stockout, rate, and even a client's own receive limit).
_RULES = (
    Rule(
        r"received message larger than max",
        UnknownError,
        "raise grpc.max_receive_message_length of the channel: this is the client's limit, not the service's",
    ),
    Rule(r"requests per minute|rate.?limit", RateLimitedError),
    Rule(r"LOCATION_POLICY_VIOLATED|Permission denied on 'locations/", NotInZoneError),
    Rule(r"Location \S+ is not found or access is unauthorized", NotInZoneError),
    Rule(r"has not been used in project|SERVICE_DISABLED|accessNotConfigured", ApiDisabledError),
    # What google-auth says inside an UNAVAILABLE when a token is refused; a network that fails there reads differently and may pass.
    Rule(r"invalid_grant|invalid_client|unauthorized_client|account_not_found", CredentialsError),
    Rule(r"free-trial billing account", PermissionDeniedError, "upgrade the billing account to a paid one"),
)
_BY_CODE: dict[int, type[CloudError]] = {
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


def classify(
    code: int | None,
    words: str,
    *,
    service: Service,
    resource: str,
    zone: str | None = None,
    operation: bool = False,
    reasons: Iterable[str] = (),
) -> CloudError:
    """The error for a google.rpc.Code and the service's words.

    `operation` says that it is the end of a long-running operation: there an unexplained code 8 means that capacity ran out.
    `reasons`: what the service says beside its words, for programs.
    """
    evidence = " ".join((words, *reasons))
    for rule in (*service.rules, *_RULES):
        if re.search(rule.pattern, evidence, re.IGNORECASE):
            return rule.error(words, service=service, resource=resource, zone=zone, code=code, next_step=rule.next_step)
    kind = StockoutError if operation and code == _RESOURCE_EXHAUSTED else _BY_CODE.get(code or 0, UnknownError)
    return kind(words, service=service, resource=resource, zone=zone, code=code)


def from_status(status: Any, *, service: Service, resource: str, zone: str | None = None) -> CloudError:
    """The error for a google.rpc.Status, as a long-running operation ends with."""
    words = " ".join((status.message, *_typed_details(status.details)))
    return classify(int(status.code), words, service=service, resource=resource, zone=zone, operation=True)


def from_exception(error: Exception, *, service: Service, resource: str, zone: str | None = None) -> CloudError:
    """The error for an exception of google-api-core (calls and operations, sync and async), google-auth, or a plain TimeoutError."""
    from google.api_core import exceptions as core  # only here: whoever has such an exception has paid for the import
    from google.auth.exceptions import GoogleAuthError

    if isinstance(error, core.RetryError) and isinstance(error.cause, Exception):
        return from_exception(error.cause, service=service, resource=resource, zone=zone)
    if isinstance(error, GoogleAuthError):
        return _from_auth(error, service=service, resource=resource, zone=zone)
    if isinstance(error, TimeoutError):
        return DeadlineExceededError(str(error), service=service, resource=resource, zone=zone, code=_DEADLINE_EXCEEDED)
    if isinstance(error, OSError):
        return _from_connection(error, service=service, resource=resource, zone=zone)
    if not isinstance(error, core.GoogleAPICallError):
        return UnknownError(f"{type(error).__name__}: {error}", service=service, resource=resource, zone=zone)
    code = _rpc_code(error)
    if code is None and error.code == 429:
        return RateLimitedError(str(error.message), service=service, resource=resource, zone=zone)
    words = " ".join((str(error.message), *_typed_details(error.details), error.reason or ""))
    reasons = [str(part.get("reason", "")) for part in error.errors if isinstance(part, dict)]
    return classify(code, words, service=service, resource=resource, zone=zone, operation=_from_operation(error), reasons=reasons)


def _from_auth(error: Exception, *, service: Service, resource: str, zone: str | None) -> CloudError:
    """What google-auth raises carries the words first and what it came from behind; a network that fails may come back."""
    words = str(error.args[0]) if error.args else str(error)
    if getattr(error, "retryable", False):
        return TransientError(words, service=service, resource=resource, zone=zone, code=_UNAVAILABLE)
    return CredentialsError(words, service=service, resource=resource, zone=zone, code=_UNAUTHENTICATED)


def _from_connection(error: OSError, *, service: Service, resource: str, zone: str | None) -> CloudError:
    """REST transports let through what `requests` raises: no answer in time, or no connection."""
    from requests.exceptions import ReadTimeout

    kind = DeadlineExceededError if isinstance(error, ReadTimeout) else TransientError
    return kind(str(error), service=service, resource=resource, zone=zone)


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
