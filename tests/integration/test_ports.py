"""What really listens while a run trains, held against cluster/listeners.py; and where the cluster's token is not."""

import contextlib
import importlib
import ipaddress
import json
import os
import re
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import ray.core.generated

from cluster.listeners import LISTENERS, TRAINING, Auth, Listener, Owner, Scope, owner_of, rows_of
from cluster.ray_env import ray_environment
from tests.integration.conftest import Home, eventually, launch_command

pytestmark = pytest.mark.timeout(400)

WIDTH = [Scope.LOOPBACK, Scope.OWN, Scope.ALL]
WRONG = "0" * 64
NOT_HERE = {"MEGASCALE coordinator", "TPU runtime", "tunnel"}
"""Rows of what this cluster does not have: libtpu, and a head VM behind IAP."""
PUBLIC = {"grpc.channelz.v1.Channelz", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
NO_DESCRIPTORS = {
    "ray.rpc.ObjectManagerService": ("Push", "Pull"),
    "ray.rpc.syncer.RaySyncer": ("StartSync",),
    "opentelemetry.proto.collector.metrics.v1.MetricsService": ("Export",),
}
"""Methods of services of which Ray's Python package has no description."""
HTTP_PATHS = {
    "dashboard": ("GET /api/jobs/", "POST /api/jobs/", "GET /api/v0/nodes", "GET /api/version", "GET /api/cluster_status", "GET /logs"),
    "agent HTTP": ("POST /api/job_agent/jobs/", "GET /api/job_agent/jobs/x/logs"),
    "runtime environment agent": ("POST /get_runtime_envs_info", "POST /get_or_create_runtime_env"),
}
HARMLESS = {
    "dashboard": "GET /api/jobs/",
    "agent HTTP": "GET /api/job_agent/jobs/x/logs",
    "runtime environment agent": "POST /get_runtime_envs_info",
}
SESSION = "import ray, sys; ray.init(sys.argv[1]); print('up', flush=True); input()"


@dataclass(frozen=True)
class Found:
    """A listening socket."""

    command: str
    ip: str
    port: int
    kind: str
    own_ip: str
    environment: Mapping[str, str]

    @property
    def scope(self) -> Scope:
        if self.ip == self.own_ip:
            return Scope.OWN
        return Scope.LOOPBACK if ipaddress.ip_address(self.ip).is_loopback else Scope.ALL

    @property
    def address(self) -> str:
        return f"{'127.0.0.1' if self.scope is Scope.ALL else self.ip}:{self.port}"

    def __str__(self) -> str:
        return f"{self.ip}:{self.port} ({self.kind}) of {self.command[:150]}"


@dataclass(frozen=True)
class Watched:
    """A cluster on which a run trains and a session of Ray's client is open."""

    home: Home
    record: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = self.record["head"]["settings"]
        return found

    @property
    def token(self) -> str:
        return Path(self.settings["token_file"]).read_text()

    def listeners(self) -> list[Found]:
        found = []
        for process in self.home.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                environment = process.environ()
                own = self.own_ip(environment)
                command = " ".join(process.cmdline()).strip()
                for socket in process.net_connections(kind="inet"):
                    if socket.status == psutil.CONN_LISTEN or (socket.type.name == "SOCK_DGRAM" and not socket.raddr):
                        ip = socket.laddr.ip.removeprefix("::ffff:")
                        found.append(Found(command, ip, socket.laddr.port, socket.type.name, own, environment))
        return found

    def own_ip(self, environment: Mapping[str, str]) -> str:
        """The address by which the cluster knows the machine that the process is on; empty for what is on the user's."""
        mark = environment.get("PODLAUNCH_OWNER", "")
        if mark.startswith("host-"):
            return environment["GCE_METADATA_HOST"].rpartition(":")[0]
        return str(self.settings["ip"]) if mark.startswith("head-") else ""


PLAIN = "run.spares=false"
"""Of a spare the kernel does not show the environment that its orders brought."""


@pytest.fixture(scope="module")
def watched(home: Home) -> Iterator[Watched]:
    assert home.tpu("start").returncode == 0
    found = Watched(home, json.loads((home.state / "clusters" / "local" / "cluster.json").read_text()))
    with client_session(found):
        settings = ("trainer.steps=100000", "trainer.checkpoint_every=100000", "trainer.seq_len=32", "trainer.eval_batches=1", PLAIN)
        launch = home.start(*launch_command("run.name=scanned", *settings))
        eventually(lambda: (status := home.run("scanned").status()) is not None and status.step >= 1, "the run trains")
        yield found
        assert home.tpu("train", "stop", "scanned").returncode == 0
        launch.communicate(timeout=120)


@contextlib.contextmanager
def client_session(watched: Watched, tries: int = 4) -> Iterator[None]:
    """Somebody who came by ray.init("ray://..."). Ray's client server gives a session 30 s to start, which a busy machine may not make."""
    address = f"ray://{watched.settings['ip']}:{watched.settings['client_port']}"
    environment = ray_environment(watched.settings["token_file"], watched.home.env)
    for _ in range(tries):
        session = subprocess.Popen([sys.executable, "-c", SESSION, address], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert session.stdin is not None
        assert session.stdout is not None
        if session.stdout.readline() == b"up\n":
            break
        session.communicate(timeout=60)
    else:
        raise AssertionError(f"no session of Ray's client server in {tries} tries")
    try:
        yield
    finally:
        session.communicate(b"\n", timeout=60)


def test_all_that_listens_is_in_the_table_no_wider_and_asks_who_comes(watched: Watched) -> None:
    seen, problems = set(), []
    for one in watched.listeners():
        row = fitting_row(one, watched)
        if row is not None:
            seen.add(row.name)
        elif still_there(one, watched):  # not of a worker that ended meanwhile
            problems.append(str(one))
    assert problems == []
    assert {row.name for row in LISTENERS} - seen <= NOT_HERE | (
        {"emulated Cloud Storage"} if emulator(watched)["storage"] == "" else set()
    )


def fitting_row(one: Found, watched: Watched) -> Listener | None:
    owner = owner_of(one.command)
    if owner is None or one.kind != "SOCK_STREAM":
        return None
    rows = [row for row in rows_of(owner) if WIDTH.index(one.scope) <= WIDTH.index(row.scope)]
    named = known_port(owner, one, watched)
    if named is not None:
        return next((row for row in rows if row.name == named), None)
    return next((row for row in rows if behaves(row, one, watched.token)), None)


def known_port(owner: Owner, one: Found, watched: Watched) -> str | None:
    """The row's name where somebody wrote the port down, so that nobody has to be asked: a foreign word would disturb gloo."""
    if owner is TRAINING:
        coordinator = (
            one.environment["PODLAUNCH_PROCESS_ID"] == "0" and one.environment["PODLAUNCH_COORDINATOR"] == f"{one.own_ip}:{one.port}"
        )
        return "JAX coordinator" if coordinator else "gloo"
    where = emulator(watched)
    names = {
        where["grpc"]: "emulated Cloud TPU API and Secret Manager",
        where["rest"].removeprefix("http://"): "emulated REST APIs",
        where["admin"].removeprefix("http://"): "emulator's admin endpoint",
        where["storage"].removeprefix("http://"): "emulated Cloud Storage",
    }
    return names.get(f"{one.ip}:{one.port}")


def emulator(watched: Watched) -> dict[str, str]:
    found: dict[str, str] = json.loads((watched.home.state / "emulator" / "endpoint.json").read_text())
    return found


def still_there(one: Found, watched: Watched) -> bool:
    return any((other.ip, other.port, other.command) == (one.ip, one.port, one.command) for other in watched.listeners())


def behaves(row: Listener, one: Found, token: str) -> bool:
    """Whether what listens there speaks the row's protocol and lets in whom the row says, and nobody else."""
    if row.auth is Auth.USER:
        return False  # known by its port
    if row.protocol == "gRPC":
        return asks_for_token(row, one.address)
    if row.auth is Auth.TOKEN:
        wanted = [(path, value, code) for path in HTTP_PATHS[row.name] for value, code in (("", 401), (WRONG, 403))]
        refused = all(http(one.address, path, value)[0] == code for path, value, code in wanted)
        return refused and http(one.address, HARMLESS[row.name], token)[0] not in (0, 401, 403)
    if row.name.startswith("metadata server"):
        return http(one.address, "GET /computeMetadata/v1/instance/attributes/accelerator-type")[0] == 200
    return http(one.address, "GET /metrics")[1].startswith(b"# HELP ") and http(one.address, "POST /metrics")[0] == 405


def asks_for_token(row: Listener, address: str) -> bool:
    """Whether all of the row's methods are refused without the token and with a wrong one, and there are no others."""
    assert row.serves
    with grpc.insecure_channel(address) as channel:
        for service in row.serves:
            for method in methods()[service]:
                for value in ("", WRONG):
                    if call(channel, f"/{service}/{method}", value) is not grpc.StatusCode.UNAUTHENTICATED:
                        return False
        listed = services(channel)
        return listed is None or listed - PUBLIC == set(row.serves)


def call(channel: grpc.Channel, method: str, token: str = "", body: bytes = b"") -> Any:
    """The status of a call; None when it was answered."""
    # Without a node's id Ray 2.60.0's GCS and raylet die of a call to RaySyncer.
    metadata = (("node_id", "ab" * 28), *((("authorization", f"Bearer {token}"),) if token else ()))
    try:
        channel.unary_unary(method)(body, timeout=10, metadata=metadata)
    except grpc.RpcError as error:
        return error.code()
    return None


def methods() -> dict[str, tuple[str, ...]]:
    """The methods of every service of Ray."""
    found = dict(NO_DESCRIPTORS)
    (folder,) = ray.core.generated.__path__
    for path in Path(folder).glob("*_pb2.py"):
        described = importlib.import_module(f"ray.core.generated.{path.stem}").DESCRIPTOR.services_by_name.values()
        found |= {service.full_name: tuple(method.name for method in service.methods) for service in described}
    return found


def services(channel: grpc.Channel) -> set[str] | None:
    """What a server says that it serves (gRPC's reflection, v1alpha: list_services); None where it does not tell."""
    ask = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    try:
        (answer,) = ask(iter([b"\x3a\x00"]), timeout=10)
    except grpc.RpcError:
        return None
    return {name.decode() for name in re.findall(rb"[a-z]\w*(?:\.\w+)+", answer)}


def http(address: str, request: str, token: str = "") -> tuple[int, bytes]:
    """Status and body; status 0 from what does not speak HTTP."""
    verb, path = request.split(" ")
    headers = {"Metadata-Flavor": "Google", **({"Authorization": f"Bearer {token}"} if token else {})}
    asked = urllib.request.Request(f"http://{address}{path}", b"" if verb == "POST" else None, headers, method=verb)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except Exception:  # noqa: BLE001  # whatever urllib makes of a gRPC server's words
        return 0, b""


@pytest.mark.skipif(os.getuid() != 0, reason="to act as another user takes root")
def test_the_emulated_cloud_refuses_other_users(watched: Watched) -> None:
    where = emulator(watched)
    ask = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)"
    for url in (f"{where['rest']}/v2/projects/p/locations/us-central2-b/nodes", f"{where['admin']}/nodes"):
        done = subprocess.run(
            ["/usr/bin/python3", "-c", ask, url],
            user=65534,
            group=65534,
            env={},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert "HTTP Error 403" in done.stderr


def test_the_token_is_in_its_file_and_nowhere_else(watched: Watched) -> None:
    token, file = watched.token.encode(), Path(watched.settings["token_file"])
    assert re.fullmatch(rb"[0-9a-f]{64}", token), "256 bits"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600

    looked, ray_folders = 0, {Path(watched.settings["temp_dir"])}
    for process in watched.home.processes():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
            for name in ("cmdline", "environ"):
                assert token not in Path(f"/proc/{process.pid}/{name}").read_bytes(), process
            looked += 1
            if process.environ().get("PODLAUNCH_OWNER", "").startswith("host-"):
                ray_folders.add(Path(process.environ()["TMPDIR"]))
    assert looked > 15
    assert len(ray_folders) == 3, "of the head and of two hosts"

    places = [watched.home.state, watched.home.folder, *ray_folders]
    files = [path for place in places for path in place.rglob("*") if path.is_file() and not path.is_symlink()]
    for known in ("cloud.sqlite3", "serial.log", "gcs_server.out", "raylet.out", "launch.log"):
        assert known in {path.name for path in files}
    assert [path for path in files if token in content(path)] == [file]

    for path in (
        "/api/jobs/",
        "/api/v0/nodes?detail=true",
        "/api/v0/actors?detail=true",
        "/api/v0/runtime_envs?detail=true",
        "/nodes?view=summary",
    ):
        url = f"{watched.settings['dashboard_ip']}:{watched.settings['dashboard_port']}"
        code, body = http(url, f"GET {path}", watched.token)
        assert (code, token in body) == (200, False), path


def content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""  # rotated or removed meanwhile
