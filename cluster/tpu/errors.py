"""What the Cloud TPU service refuses: the errors of every service (cluster/cloud_errors.py) and the texts that only this one sends.

Sources of the texts: section "Errors seen in the wild" of the API fact sheet, collected from public issues and run logs.
"""

import functools

from cluster import cloud_errors
from cluster.cloud_errors import (
    AlreadyExistsError,
    ApiDisabledError,
    CloudError,
    DeadlineExceededError,
    InvalidRequestError,
    InvalidRuntimeVersionError,
    NotFoundError,
    NotInZoneError,
    PermissionDeniedError,
    PreemptedError,
    QuotaError,
    RateLimitedError,
    ReservationError,
    Rule,
    Service,
    StockoutError,
    TransientError,
    UnknownError,
)

TPUError = CloudError
"""What every service raises: what the Cloud TPU service raises differs in its words only."""
REFUSALS = (StockoutError, QuotaError, ReservationError, NotInZoneError)
"""What says for certain that a zone makes no slice now; after any other error the slice may be there, so no other zone is asked at once."""
__all__ = [
    "REFUSALS",
    "AlreadyExistsError",
    "ApiDisabledError",
    "DeadlineExceededError",
    "InvalidRequestError",
    "InvalidRuntimeVersionError",
    "NotFoundError",
    "NotInZoneError",
    "PermissionDeniedError",
    "PreemptedError",
    "QuotaError",
    "RateLimitedError",
    "ReservationError",
    "StockoutError",
    "TPUError",
    "TransientError",
    "UnknownError",
    "from_exception",
    "from_status",
]
CLOUD_TPU = Service(
    "Cloud TPU",
    "tpu.googleapis.com",
    "roles/tpu.admin",
    next_steps={
        NotInZoneError: "choose another zone, or a type that this one has (gcloud compute tpus accelerator-types list --zone ZONE)",
        NotFoundError: "list what exists: gcloud compute tpus tpu-vm list --zone ZONE",
    },
    rules=(
        Rule(r"no more capacity in the zone", StockoutError),
        Rule(r"insufficient reserved capacity", ReservationError),
        Rule(r"quota limit '|quota '[^']*' exhausted", QuotaError),
        Rule(r"while in state PREEMPTED", PreemptedError),
        Rule(r"could not be found in the zonal accelerator configurations", NotInZoneError),
        Rule(r"the accelerator \S+ was not found in zone", NotInZoneError),
        Rule(r"received an invalid AcceleratorType", NotInZoneError),
        Rule(r'"Runtime.?Version" value|runtime.?version', InvalidRuntimeVersionError),
        Rule(r"migrate to TPU VM Architecture", InvalidRequestError, "use the v2 API's TPU VMs"),
    ),
)
from_exception = functools.partial(cloud_errors.from_exception, service=CLOUD_TPU)
from_status = functools.partial(cloud_errors.from_status, service=CLOUD_TPU)
