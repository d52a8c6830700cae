"""The metadata server of one emulated host: what `http://metadata.google.internal/computeMetadata/v1/` answers on a TPU VM or an instance.

Its address is the host's own, so that every host of a slice sees its own worker number on the same machine. Clients find it through
GCE_METADATA_HOST, the variable that Google's own libraries read.
"""

import functools
import hashlib
import json
import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cluster.emulator.guest import GuestAttributes
from cluster.emulator.model import InstanceRecord, Machine, NodeRecord, project_number, service_account, tpu_env

PREFIX = "/computeMetadata/v1/"
GUEST = f"{PREFIX}instance/guest-attributes/"
ENABLED = "instance/attributes/enable-guest-attributes"
_LISTS = frozenset({"aliases", "scopes"})
"""Lines of text by themselves, lists in JSON."""


def entries(machine: Machine, worker: int) -> dict[str, str]:
    """Every key of the host's metadata, as a path below /computeMetadata/v1/, with its value."""
    special = _of_node(machine, worker) if isinstance(machine, NodeRecord) else _of_instance(machine)
    number = project_number(machine.project)
    account = f"instance/service-accounts/{service_account(machine.project)}/"
    return {
        "instance/zone": f"projects/{number}/zones/{machine.zone}",
        "instance/preempted": "FALSE",
        "instance/maintenance-event": "NONE",
        "instance/network-interfaces/0/ip": machine.hosts[worker].ip,
        **_account("instance/service-accounts/default/", machine.project),
        **_account(account, machine.project),
        "project/project-id": machine.project,
        "project/numeric-project-id": number,
        **special,
    }


def _of_node(node: NodeRecord, worker: int) -> dict[str, str]:
    attributes = {
        **dict(node.message.metadata),
        "accelerator-type": node.kind.name,
        "agent-worker-number": str(worker),
        "instance-id": node.node_id,
        "worker-network-endpoints": ",".join(host.ip for host in node.hosts),
        "tpu-env": tpu_env(node, worker),
    }
    return {
        **{f"instance/attributes/{key}": value for key, value in attributes.items()},
        "instance/name": f"t1v-n-{node.uid[:8]}-w-{worker}",
        "instance/hostname": f"t1v-n-{node.uid[:8]}-w-{worker}.{node.zone}.c.{node.project}.internal",
        **node.notices,
    }


def _of_instance(instance: InstanceRecord) -> dict[str, str]:
    interface = instance.body["networkInterfaces"][0]
    external = {
        f"instance/network-interfaces/0/access-configs/{index}/external-ip": config["natIP"]
        for index, config in enumerate(interface.get("accessConfigs", []))
    }
    machine_type = instance.body["machineType"].rpartition("/")[2]
    return {
        **{f"instance/attributes/{key}": value for key, value in instance.metadata.items()},
        "instance/name": instance.title,
        "instance/id": instance.body["id"],
        "instance/hostname": f"{instance.title}.{instance.zone}.c.{instance.project}.internal",
        "instance/machine-type": f"projects/{project_number(instance.project)}/machineTypes/{machine_type}",
        **external,
    }


def _account(folder: str, project: str) -> dict[str, str]:
    """A service account. Its token opens nothing: the emulated services take callers of this user without one."""
    token = {"access_token": f"emulated-{project_number(project)}", "expires_in": 3599, "token_type": "Bearer"}
    return {
        f"{folder}aliases": "default\n",
        f"{folder}email": service_account(project),
        f"{folder}scopes": "https://www.googleapis.com/auth/cloud-platform\n",
        f"{folder}token": json.dumps(token),
    }


class MetadataServer:
    """Serves one host until `stop`. Raises OSError when the address cannot be had."""

    def __init__(self, ip: str, port: int, values: Mapping[str, str], guest: GuestAttributes) -> None:
        """`port`: 0 for any free one. `guest`: what the host itself may write."""
        self._server = _Server((ip, port), _Handler)
        self._server.guest = guest
        self._server.values, self._server.changed, self._server.ended = dict(values), threading.Condition(), False
        self.port: int = self._server.server_address[1]
        serve = functools.partial(self._server.serve_forever, poll_interval=0.05)
        self._thread = threading.Thread(target=serve, daemon=True, name=f"metadata-{ip}")
        self._thread.start()

    def show(self, values: Mapping[str, str]) -> None:
        """Answer with `values` from now on."""
        with self._server.changed:
            self._server.values = dict(values)
            self._server.changed.notify_all()

    def stop(self) -> None:
        with self._server.changed:
            self._server.ended = True
            self._server.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    values: dict[str, str]
    guest: GuestAttributes
    changed: threading.Condition
    ended: bool

    def server_bind(self) -> None:
        """Without the base class's look-up of the address's name, which may wait for a DNS server."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = "Metadata Server for VM"
    sys_version = ""

    def do_GET(self) -> None:
        if not self._from_a_program():
            return
        url = urlsplit(self.path)
        if url.path.startswith(GUEST):
            self._guest(lambda name: self.server.guest.values().get(name))
            return
        query = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}

        def look() -> tuple[str, str] | None:
            return lookup(self.server.values, url.path, recursive="recursive" in query)

        if query.get("wait_for_change") == "true":
            self._wait(look, query)
        found = look()
        if found is None:
            self._answer(404, "Not Found\n")
        else:
            self._answer(200, *found)

    def do_PUT(self) -> None:
        """The only thing that a host can write here; PUT and DELETE as in Google's "Setting and querying guest attributes"."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()

        def put(name: str) -> str:
            self.server.guest.put(name, body)
            return ""

        if self._from_a_program():
            self._guest(put)

    def do_DELETE(self) -> None:
        def remove(name: str) -> str:
            self.server.guest.remove(name)
            return ""

        if self._from_a_program():
            self._guest(remove)

    def _from_a_program(self) -> bool:
        """Whether the request is none that a browser was lured into; it is answered when it may be."""
        if self.headers.get("Metadata-Flavor") == "Google":
            return True
        self._answer(403, "Missing Metadata-Flavor:Google header.\n")
        return False

    def _guest(self, act: Callable[[str], str | None]) -> None:
        """Do it with the attribute `namespace/key` of the path. The answer where they are not enabled is a guess."""
        name = urlsplit(self.path).path.removeprefix(GUEST)
        if self.server.values.get(ENABLED, "").upper() != "TRUE":
            self._answer(403, "Guest attributes endpoint access is disabled.\n")
        elif name.count("/") != 1 or (answer := act(name)) is None:
            self._answer(404, "Not Found\n")
        else:
            self._answer(200, answer)

    def _wait(self, look: Callable[[], tuple[str, str] | None], query: Mapping[str, str]) -> None:
        """Until the value is not the one of `last_etag` (or of now) any more, or `timeout_sec` is over."""
        known = query.get("last_etag") or _etag(look())
        limit = float(query["timeout_sec"]) if "timeout_sec" in query else None
        with self.server.changed:
            self.server.changed.wait_for(lambda: self.server.ended or _etag(look()) != known, limit)

    def _answer(self, status: int, text: str, kind: str = "application/text") -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Metadata-Flavor", "Google")
        self.send_header("ETag", _etag((text, kind)))
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Not a line for every look: hosts ask every second."""


def lookup(values: Mapping[str, str], path: str, *, recursive: bool) -> tuple[str, str] | None:
    """Body and content type for a path: a value, the listing of a directory (sub-directories end with /), or all that is below as JSON."""
    if path == "/":  # what clients ask to find out whether there is a metadata server
        return "computeMetadata/\n", "application/text"
    if not path.startswith(PREFIX):
        return None
    key = path.removeprefix(PREFIX)
    if key in values:
        return values[key], "application/json" if key.endswith("/token") else "application/text"
    directory = key if key.endswith("/") or not key else f"{key}/"
    below = {name.removeprefix(directory): value for name, value in sorted(values.items()) if name.startswith(directory)}
    if not below:
        return None
    if recursive:
        return json.dumps(_tree(below)), "application/json"
    names = {name.split("/")[0] + ("/" if "/" in name else "") for name in below}
    return "".join(f"{name}\n" for name in sorted(names)), "application/text"


def _tree(values: Mapping[str, str]) -> dict[str, Any]:
    """Nested by the parts of the keys. The real server writes some keys in camelCase here; attributes keep their names, there as here.

    Lists are lists here, and tokens are left out, there as here.
    """
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        if name in _LISTS:
            place[name] = value.split()
        elif name != "token":
            place[name] = value
    return tree


def _etag(found: tuple[str, str] | None) -> str:
    return hashlib.sha256(found[0].encode()).hexdigest()[:16] if found is not None else "0"
