"""The part of Compute Engine v1 that is served, over REST only, as the real service has it: instances and their zonal operations."""

import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, unquote

from cluster.emulator.api import Api, Dropped
from cluster.emulator.catalogue import ZONES
from cluster.emulator.checks import INVALID_ARGUMENT, NOT_FOUND, UNAVAILABLE
from cluster.emulator.cloud import Cloud
from cluster.emulator.compute_bodies import url
from cluster.emulator.compute_errors import error_answer
from cluster.emulator.http import Answer, Request
from cluster.emulator.model import Refusal

PREFIX = "/compute/v1/"
_ZONE = r"projects/[^/]+/zones/[^/]+"
Query = dict[str, str]


class ComputeRest:
    """Answers HTTP requests from one cloud's instances."""

    def __init__(self, api: Api, cloud: Cloud) -> None:
        self._api, self._cloud, self._instances = api, cloud, cloud.instances
        routes: list[tuple[str, str, str, Callable[[str, Query, dict[str, Any]], Any]]] = [
            ("POST", f"{_ZONE}/instances", "instances.insert", self._insert),
            ("GET", f"{_ZONE}/instances", "instances.list", self._list),
            ("GET", r"projects/[^/]+/aggregated/instances", "instances.aggregatedList", self._list_everywhere),
            ("GET", f"{_ZONE}/instances/[^/]+", "instances.get", lambda path, *_: self._instances.get(path)),
            ("DELETE", f"{_ZONE}/instances/[^/]+", "instances.delete", self._delete),
            ("GET", f"{_ZONE}/operations/[^/]+", "zoneOperations.get", lambda path, *_: self._instances.get_operation(path)),
            ("POST", f"({_ZONE}/operations/[^/]+)/wait", "zoneOperations.wait", self._wait),
        ]
        self._routes = [(verb, re.compile(pattern), method, handle) for verb, pattern, method, handle in routes]

    def answer(self, request: Request) -> Answer:
        try:
            return Answer(200, json.dumps(self._do(request)))
        except Dropped:
            return Answer(0, "")
        except Refusal as refusal:
            return error_answer(refusal)

    def _do(self, request: Request) -> Any:
        """Raises Refusal."""
        path = unquote(request.path).removeprefix(PREFIX)
        query = dict(parse_qsl(request.query, keep_blank_values=True))
        for verb, pattern, method, handle in self._routes:
            if verb == request.verb and pattern.fullmatch(path):
                body = _parse(request.body)
                target = f"{path}/{body.get('name', '')}" if method == "instances.insert" else path.removesuffix("/wait")
                return self._api.guard(method, target, lambda handle=handle, body=body: handle(path, query, body))  # type: ignore[misc]
        raise Refusal(NOT_FOUND, f"The requested URL {request.path} was not found on this server.")

    def _insert(self, path: str, query: Query, body: dict[str, Any]) -> Any:
        _, project, _, zone, _ = path.split("/")
        return self._instances.insert(project, zone, body, query.get("requestId", ""))

    def _delete(self, path: str, query: Query, _: dict[str, Any]) -> Any:
        return self._instances.delete(path, query.get("requestId", ""))

    def _wait(self, path: str, *_: Any) -> Any:
        return self._instances.wait_operation(path.removesuffix("/wait"))

    def _list(self, path: str, query: Query, _: dict[str, Any]) -> Any:
        zone = path.removesuffix("/instances")
        items, token = self._instances.list_page(zone, query.get("filter", ""), *_page(query))
        return {
            "kind": "compute#instanceList",
            "id": path,
            "selfLink": url(path),
            "items": items,
            **({"nextPageToken": token} if token else {}),
        }

    def _list_everywhere(self, path: str, query: Query, _: dict[str, Any]) -> Any:
        """Every zone is in the answer, those with nothing to show by a warning. One that cannot be reached fails the whole list, unless the
        caller takes a part of it.
        """
        project = path.split("/")[1]
        down = [place.rpartition("/")[2] for place in self._cloud.unreachable(f"projects/{project}/locations/-")]
        partial = query.get("returnPartialSuccess", "").lower() == "true"
        if down and not partial:
            raise Refusal(UNAVAILABLE, f"The service is currently unavailable in {', '.join(down)}.")  # a guess
        found, token = self._instances.list_everywhere(project, query.get("filter", ""), *_page(query))
        scopes: dict[str, Any] = {}
        for zone in sorted({*ZONES, *found, *down}):
            scope = f"zones/{zone}"
            scopes[scope] = (
                _warning(scope, "UNREACHABLE")
                if zone in down
                else {"instances": found[zone]}
                if zone in found
                else _warning(scope, "NO_RESULTS_ON_PAGE")
            )
        return {
            "kind": "compute#instanceAggregatedList",
            "id": path,
            "selfLink": url(path),
            "items": scopes,
            **({"unreachables": [url(f"projects/{project}/zones/{zone}") for zone in down]} if down else {}),
            **({"nextPageToken": token} if token else {}),
        }


def _warning(scope: str, code: str) -> dict[str, Any]:
    words = {
        "NO_RESULTS_ON_PAGE": f"There are no results for scope '{scope}' on this page.",
        "UNREACHABLE": f"The scope '{scope}' cannot be reached.",  # a guess
    }
    return {"warning": {"code": code, "message": words[code], "data": [{"key": "scope", "value": scope}]}}


def _page(query: Query) -> tuple[int, str]:
    """Raises Refusal."""
    size = query.get("maxResults", "0")
    if not size.isdecimal():
        raise Refusal(INVALID_ARGUMENT, f"Invalid value for field 'maxResults': '{size}'.")
    return int(size), query.get("pageToken", "")


def _parse(body: bytes) -> dict[str, Any]:
    """Raises Refusal."""
    try:
        values = json.loads(body) if body.strip() else {}
    except ValueError as error:
        raise Refusal(INVALID_ARGUMENT, f"Parse Error: {error}") from error
    if not isinstance(values, dict):
        raise Refusal(INVALID_ARGUMENT, "Parse Error: the body must be a JSON object.")
    return values
