"""The metadata server of a VM: who this host is. Every Compute Engine and TPU VM has one."""

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.errors import ClusterError

Fetch = Callable[[str], str]
"""Takes a path below computeMetadata/v1/ and returns its text. Raises ClusterError when there is no answer."""

HOST_ATTRIBUTE = "podlaunch-host"
"""The custom metadata key that holds the host agent's settings as JSON; written by the node provider."""
GUEST_ATTRIBUTES_ENABLED = {"enable-guest-attributes": "TRUE"}
"""The metadata with which a VM may publish words about itself (docs: "Setting and querying guest attributes")."""
TROUBLE = "podlaunch/trouble"
"""The guest attribute that says why a host cannot join its cluster: `worker <id>: <words>`."""
HEAD_ATTRIBUTE = "podlaunch-head"
"""The same of a head VM; written by the client that creates it."""


@dataclass(frozen=True)
class HostIdentity:
    """Which host of which slice a VM is."""

    slice_name: str
    worker_id: int
    worker_ips: tuple[str, ...]
    """Addresses of all hosts of the slice, by worker id."""
    accelerator_type: str
    topology: str

    @property
    def ip(self) -> str:
        return self.worker_ips[self.worker_id]


def fetch(path: str, *, timeout: float = 5.0) -> str:
    """Ask the metadata server. GCE_METADATA_HOST moves it, as Google's own libraries have it."""
    return _ask("GET", path, None, timeout)


def tell_trouble(identity: "HostIdentity", words: str | None, *, timeout: float = 5.0) -> None:
    """Publish why this host cannot join its cluster, where `tpu status` finds it; None: all is well. Raises ClusterError."""
    path = f"instance/guest-attributes/{TROUBLE}"
    if words is None:
        _ask("DELETE", path, None, timeout)
    else:
        _ask("PUT", path, f"worker {identity.worker_id}: {words}".encode(), timeout)


def _ask(method: str, path: str, body: bytes | None, timeout: float) -> str:
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/{path}"
    request = urllib.request.Request(url, data=body, headers={"Metadata-Flavor": "Google"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # link-local: never through a proxy
    try:
        with opener.open(request, timeout=timeout) as response:
            text: str = response.read().decode()
            return text
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise ClusterError(f"the metadata server at {host} does not answer for {path}: {error}") from error


def read_identity(fetch: Fetch) -> HostIdentity:
    """Raises ClusterError when an attribute is missing or makes no sense: a missing worker id must never become 0."""
    worker = fetch("instance/attributes/agent-worker-number").strip()
    endpoints = fetch("instance/attributes/worker-network-endpoints").strip()
    ips = tuple(entry.rsplit(":", 1)[-1] for entry in endpoints.split(",") if entry)
    if not worker.isdigit() or int(worker) >= len(ips):
        raise ClusterError(f"the metadata server calls this host worker {worker!r} of the endpoints {endpoints!r}")
    return HostIdentity(
        slice_name=fetch("instance/attributes/instance-id").strip(),
        worker_id=int(worker),
        worker_ips=ips,
        accelerator_type=fetch("instance/attributes/accelerator-type").strip(),
        topology=parse_tpu_env(fetch("instance/attributes/tpu-env")).get("TOPOLOGY", ""),
    )


def read_place(fetch: Fetch) -> tuple[str, str]:
    """Project id and zone of this host."""
    return fetch("project/project-id").strip(), fetch("instance/zone").strip().rpartition("/")[2]


def parse_tpu_env(text: str) -> dict[str, str]:
    """The `KEY: 'value'` lines of the tpu-env attribute."""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {key.strip(): value.strip().strip("'") for key, value in pairs}


def read_settings(fetch: Fetch) -> dict[str, Any]:
    """The host agent's settings, as the node provider wrote them into the node's metadata."""
    values = json.loads(fetch(f"instance/attributes/{HOST_ATTRIBUTE}"))
    assert isinstance(values, dict)
    return values
