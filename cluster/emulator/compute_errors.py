"""How Compute Engine words a refusal: the body of a failed call, and the error of an operation.

Its own forms, older than google.rpc.Status: `reason` of a call (docs: "Compute Engine API errors") and `code` of an operation's error.
"""

import json
from typing import Any

from cluster.emulator.http import Answer
from cluster.emulator.model import Refusal

# google.rpc.Code -> HTTP status, and the reason of a call
_CALL = {
    3: (400, "invalid"),
    4: (504, "deadlineExceeded"),
    5: (404, "notFound"),
    6: (409, "alreadyExists"),
    7: (403, "forbidden"),
    8: (403, "quotaExceeded"),
    9: (400, "resourceNotReady"),
    10: (409, "conflict"),
    12: (501, "notImplemented"),
    13: (500, "internalError"),
    14: (503, "backendError"),
    16: (401, "required"),
}
# google.rpc.Code -> HTTP status with its message, and the code of an operation's error
_OPERATION = {
    3: (400, "BAD REQUEST", "INVALID_USAGE"),
    5: (404, "NOT FOUND", "RESOURCE_NOT_FOUND"),
    6: (409, "CONFLICT", "RESOURCE_ALREADY_EXISTS"),
    7: (403, "FORBIDDEN", "PERMISSIONS_ERROR"),
    8: (503, "SERVICE UNAVAILABLE", "ZONE_RESOURCE_POOL_EXHAUSTED"),
    9: (400, "BAD REQUEST", "RESOURCE_NOT_READY"),
    10: (409, "CONFLICT", "RESOURCE_OPERATION_ABORTED"),
}
_INTERNAL = (500, "INTERNAL SERVER ERROR", "INTERNAL_ERROR")


def error_answer(refusal: Refusal) -> Answer:
    """{"error": {code, message, errors: [{message, domain, reason}]}}"""
    status, reason = _CALL.get(refusal.code, (500, "internalError"))
    domain = "global"
    if "has not been used in project" in refusal.words:
        domain, reason = "usageLimits", "accessNotConfigured"
    elif refusal.code == 8:
        domain = "usageLimits"
        if "per minute" in refusal.words or "rate" in refusal.words.lower():
            reason = "rateLimitExceeded"
    inner = {"message": refusal.words, "domain": domain, "reason": reason}
    return Answer(status, json.dumps({"error": {"code": status, "message": refusal.words, "errors": [inner]}}))


def as_operation_error(reason: Refusal) -> dict[str, Any]:
    """The fields that an operation gets when it fails."""
    status, message, code = _OPERATION.get(reason.code, _INTERNAL)
    if code == "ZONE_RESOURCE_POOL_EXHAUSTED" and "quota" in reason.words.lower():
        status, message, code = 403, "FORBIDDEN", "QUOTA_EXCEEDED"
    return {
        "httpErrorStatusCode": status,
        "httpErrorMessage": message,
        "error": {"errors": [{"code": code, "message": reason.words}]},
    }
