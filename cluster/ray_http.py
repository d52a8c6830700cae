"""The head's HTTP interface: what Ray knows of the cluster, without starting Ray in this process."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError


@dataclass(frozen=True)
class RayNode:
    """A host as Ray sees it."""

    node_id: str
    ip: str
    alive: bool
    slice_name: str
    """Empty on the head."""
    worker_id: int | None


class HeadRefused(ClusterError):
    """The head answered, and the answer is no. `code` is HTTP's: 404 for something that the head does not know."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class RayHttp:
    """Asks the dashboard of one head. Raises ClusterError when it does not answer or refuses."""

    def __init__(self, url: str, token_file: Path) -> None:
        self._url = url
        self._token_file = token_file

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token_file.read_text(encoding='utf-8').strip()}"}

    def get(self, path: str, *, timeout: float = 10.0) -> Any:
        return self._request(urllib.request.Request(f"{self._url}{path}", headers=self.headers()), timeout)

    def post(self, path: str, body: Mapping[str, Any], *, timeout: float = 30.0) -> Any:
        headers = {**self.headers(), "Content-Type": "application/json"}
        return self._request(urllib.request.Request(f"{self._url}{path}", json.dumps(body).encode(), headers, method="POST"), timeout)

    def answers(self) -> bool:
        """Whether jobs can be submitted."""
        try:
            self.get("/api/jobs/", timeout=5.0)
        except ClusterError:
            return False
        return True

    def nodes(self) -> list[RayNode]:
        rows = self.get("/api/v0/nodes?limit=10000&detail=true")["data"]["result"]["result"]
        return [_node(row) for row in rows]

    def _request(self, request: urllib.request.Request, timeout: float) -> Any:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the token is for the head alone
        try:
            with opener.open(request, timeout=timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            detail = " ".join(error.read().decode(errors="replace").split())[-300:]
            raise HeadRefused(f"Ray's head at {self._url} refused {request.selector}: {error.code} {detail}", error.code) from error
        except (urllib.error.URLError, http.client.HTTPException, OSError, json.JSONDecodeError) as error:
            raise ClusterError(f"Ray's head at {self._url} does not answer: {error}") from error


def _node(row: dict[str, Any]) -> RayNode:
    labels = row.get("labels") or {}
    worker = labels.get("ray.io/tpu-worker-id")
    return RayNode(
        node_id=row["node_id"],
        ip=row["node_ip"],
        alive=row["state"] == "ALIVE",
        slice_name=labels.get("ray.io/tpu-slice-name", ""),
        worker_id=int(worker) if worker is not None else None,
    )
