"""The same methods over REST: paths, JSON and error bodies as the client's REST transport and gcloud know them.

The templates are those of the clients' own REST transports (google-cloud-tpu, google-cloud-secret-manager); /v1 is what gcloud asks for
accelerator types.
"""

import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote

from cluster.emulator.api import Api, Dropped
from cluster.emulator.checks import INVALID_ARGUMENT, NOT_FOUND
from cluster.emulator.cloud import Cloud
from cluster.emulator.compute_rest import PREFIX, ComputeRest
from cluster.emulator.http import Answer, Request
from cluster.emulator.model import Refusal
from cluster.emulator.status import status_of

# google.rpc.Code -> HTTP status and name, from google/rpc/code.proto
_HTTP = {
    1: (499, "CANCELLED"),
    2: (500, "UNKNOWN"),
    3: (400, "INVALID_ARGUMENT"),
    4: (504, "DEADLINE_EXCEEDED"),
    5: (404, "NOT_FOUND"),
    6: (409, "ALREADY_EXISTS"),
    7: (403, "PERMISSION_DENIED"),
    8: (429, "RESOURCE_EXHAUSTED"),
    9: (400, "FAILED_PRECONDITION"),
    10: (409, "ABORTED"),
    11: (400, "OUT_OF_RANGE"),
    12: (501, "UNIMPLEMENTED"),
    13: (500, "INTERNAL"),
    14: (503, "UNAVAILABLE"),
    15: (500, "DATA_LOSS"),
    16: (401, "UNAUTHENTICATED"),
}
_ZONE = "projects/*/locations/*"
_SECRET = "projects/*/secrets/*"


@dataclass(frozen=True)
class _Route:
    verb: str
    path: "re.Pattern[str]"
    field: str
    """Where the resource's name from the path goes."""
    method: str
    body: str
    """The field that the body fills: empty for none, * for the request itself."""


def _route(verb: str, field: str, resource: str, tail: str, method: str, body: str = "", version: str = "v2") -> _Route:
    name = re.escape(resource).replace(r"\*", "[^/:]+")
    return _Route(verb, re.compile(f"/{version}/({name}){re.escape(tail)}"), field, method, body)


def _routes() -> list[_Route]:
    items = {
        "Node": ("nodes", "node"),
        "QueuedResource": ("queuedResources", "queued_resource"),
        "AcceleratorType": ("acceleratorTypes", ""),
        "RuntimeVersion": ("runtimeVersions", ""),
    }
    made = []
    for kind, (collection, field) in items.items():
        version = "v[12]" if kind == "AcceleratorType" else "v2"
        made += [
            _route("GET", "parent", _ZONE, f"/{collection}", f"List{kind}s", version=version),
            _route("GET", "name", f"{_ZONE}/{collection}/*", "", f"Get{kind}", version=version),
        ]
        if field:
            made += [
                _route("POST", "parent", _ZONE, f"/{collection}", f"Create{kind}", field),
                _route("DELETE", "name", f"{_ZONE}/{collection}/*", "", f"Delete{kind}"),
            ]
    return [
        *made,
        _route("POST", "name", f"{_ZONE}/nodes/*", ":stop", "StopNode", "*"),
        _route("POST", "name", f"{_ZONE}/nodes/*", ":start", "StartNode", "*"),
        _route("POST", "name", f"{_ZONE}/nodes/*", ":getGuestAttributes", "GetGuestAttributes", "*"),
        _route("PATCH", "node.name", f"{_ZONE}/nodes/*", "", "UpdateNode", "node"),
        _route("POST", "name", f"{_ZONE}/queuedResources/*", ":reset", "ResetQueuedResource", "*"),
        _route("POST", "parent", _ZONE, ":generateServiceIdentity", "GenerateServiceIdentity", "*"),
        _route("GET", "name", "projects/*", "/locations", "ListLocations", version="v[12]"),
        _route("GET", "name", _ZONE, "", "GetLocation", version="v[12]"),
        _route("GET", "name", _ZONE, "/operations", "ListOperations"),
        _route("GET", "name", f"{_ZONE}/operations/*", "", "GetOperation"),
        _route("DELETE", "name", f"{_ZONE}/operations/*", "", "DeleteOperation"),
        _route("POST", "name", f"{_ZONE}/operations/*", ":cancel", "CancelOperation"),
        _route("POST", "parent", "projects/*", "/secrets", "CreateSecret", "secret", version="v1"),
        _route("GET", "parent", "projects/*", "/secrets", "ListSecrets", version="v1"),
        _route("GET", "name", _SECRET, "", "GetSecret", version="v1"),
        _route("DELETE", "name", _SECRET, "", "DeleteSecret", version="v1"),
        _route("POST", "parent", _SECRET, ":addVersion", "AddSecretVersion", "*", version="v1"),
        _route("GET", "parent", _SECRET, "/versions", "ListSecretVersions", version="v1"),
        _route("GET", "name", f"{_SECRET}/versions/*", "", "GetSecretVersion", version="v1"),
        _route("GET", "name", f"{_SECRET}/versions/*", ":access", "AccessSecretVersion", version="v1"),
        _route("POST", "name", f"{_SECRET}/versions/*", ":destroy", "DestroySecretVersion", "*", version="v1"),
    ]


class Rest:
    """Answers HTTP requests from an Api."""

    def __init__(self, api: Api, cloud: Cloud) -> None:
        self._api = api
        self._compute = ComputeRest(api, cloud)
        self._routes = _routes()

    def answer(self, request: Request) -> Answer:
        from google.protobuf import json_format

        if request.path.startswith(PREFIX):
            return self._compute.answer(request)
        query = parse_qsl(request.query, keep_blank_values=True)
        try:
            method, call = self._parse(request, query)
            response = self._api.call(method, call)
        except Dropped:
            return Answer(0, "")
        except Refusal as refusal:
            return error_answer(refusal)
        numbers = any(value.endswith("enum-encoding=int") for name, value in query if name == "$alt")
        return Answer(200, json_format.MessageToJson(response, use_integers_for_enums=numbers))

    def _parse(self, request: Request, query: list[tuple[str, str]]) -> tuple[str, Any]:
        """Raises Refusal."""
        from google.protobuf import json_format

        path = unquote(request.path)
        for route in self._routes:
            found = route.path.fullmatch(path) if route.verb == request.verb else None
            if found is None:
                continue
            call = self._api.methods[route.method].request()
            try:
                json_format.ParseDict(_values(route, query, request.body, call.DESCRIPTOR), call)
            except (json_format.ParseError, ValueError) as error:
                raise Refusal(INVALID_ARGUMENT, f"Invalid JSON payload received. {error}") from error
            *folders, last = route.field.split(".")
            place = call
            for folder in folders:
                place = getattr(place, folder)
            setattr(place, last, found.group(1))
            return route.method, call
        raise Refusal(NOT_FOUND, f"The requested URL {path} was not found on this server.")


def error_answer(refusal: Refusal) -> Answer:
    """As Google's services write it: {"error": {code, message, status, details}}."""
    from google.protobuf import json_format

    status, name = _HTTP[refusal.code]
    error: dict[str, Any] = {"code": status, "message": refusal.words, "status": name}
    details = json_format.MessageToDict(status_of(refusal)).get("details")
    return Answer(status, json.dumps({"error": {**error, **({"details": details} if details else {})}}))


def _values(route: _Route, query: list[tuple[str, str]], body: bytes, descriptor: Any) -> dict[str, Any]:
    """The request as a JSON object, without what the path says. Raises ValueError."""
    sent = json.loads(body) if body.strip() else {}
    if not isinstance(sent, dict):
        raise ValueError("The body must be a JSON object.")
    values: dict[str, Any] = dict(sent) if route.body == "*" else {route.body: sent} if route.body else {}
    fields = {field.json_name: field for field in descriptor.fields} | {field.name: field for field in descriptor.fields}
    for name, text in query:
        field = fields.get(name)
        if field is not None:  # the rest is of the system: alt, $alt, key, prettyPrint
            values[name] = text.lower() == "true" if field.type == field.TYPE_BOOL else text
    return values
