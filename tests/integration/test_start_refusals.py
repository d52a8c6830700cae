"""`tpu start` where the cloud refuses: one clear line, the right exit code, nothing left behind, and it works once the cause is gone.

The real command line as its own process, with settings as for Google's cloud, against the emulator's daemon.
"""

import http.client
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.cloud import tpu_v2
from google.cloud.tpu_v2.services.tpu.transports import TpuGrpcTransport

from tests.integration.conftest import Home, eventually

ZONES = ("us-central2-b", "us-east5-b")
BOTH = f"zones=[{','.join(ZONES)}]"


@dataclass
class User:
    """Somebody at a shell, with settings of a cluster on Google Cloud whose API is the emulator's."""

    folder: Path
    endpoint: str = ""
    rest: str = ""
    admin: str = ""

    @property
    def env(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("GOOGLE_", "CLOUDSDK_"))}
        own = {"PODLAUNCH_STATE_DIR": str(self.folder / "state"), "HOME": str(self.folder), "NO_COLOR": "1"}
        return {**kept, **own}

    def tpu(self, *words: str, env: dict[str, str] | None = None, limit: float = 100.0) -> "subprocess.CompletedProcess[str]":
        program = str(Path(sys.executable).parent / "tpu")
        return subprocess.run(
            [program, *words],
            cwd=self.folder,
            env={**self.env, **(env or {})},
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def start(self, name: str, *settings: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
        endpoint = [f"endpoint={self.endpoint}"] if self.endpoint else []
        return self.tpu("start", "v4", "--bare", "-y", *endpoint, f"name={name}", "project=my-project", *settings, env=env)

    def ask(self, verb: str, path: str, **values: Any) -> Any:
        """The admin endpoint; its verbs of the command line are tested elsewhere."""
        connection = http.client.HTTPConnection(self.admin.removeprefix("http://"), timeout=30)
        connection.request(verb, path, json.dumps(values))
        answer = connection.getresponse()
        body = json.loads(answer.read())
        connection.close()
        assert answer.status == 200, body
        return body

    def nodes(self, name: str) -> list[str]:
        """Whatever is there of the slices `name`."""
        ids = [node["name"].rpartition("/")[2] for node in self.ask("GET", "/nodes")]
        return [node for node in ids if node.startswith(f"{name}-")]

    def remembered(self) -> list[str]:
        return sorted(path.stem for path in (self.folder / "state" / "bare").glob("*"))


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    made = User(tmp_path_factory.mktemp("user"))
    running = json.loads(made.tpu("emulator", "start", "--profile", "instant", "--json").stdout)
    made.endpoint, made.rest, made.admin = running["grpc"], running["rest"], running["admin"]
    yield made
    assert made.tpu("emulator", "stop", "-y").returncode == 0


def error_of(done: "subprocess.CompletedProcess[str]", code: int) -> str:
    """The one line that says what is wrong; nothing else may look like an error."""
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error:", "WARNING:", "Traceback"))]
    assert (done.returncode, len(lines), lines[:1] == [line for line in lines if line.startswith("error:")]) == (code, 1, True), done
    return lines[0]


@dataclass(frozen=True)
class Trouble:
    """What the cloud is made to do, and what the user is told."""

    words: tuple[str, ...]
    """All in the one line, in this order."""
    fault: dict[str, Any] | None = None
    code: int = 1
    settings: tuple[str, ...] = ()
    """Of the first start."""
    kept: tuple[str, ...] = ()
    """Of both."""


PLAIN = ("queued_resource=false",)
TROUBLES = {
    "no-project": Trouble(("cluster.project is missing", "set GOOGLE_CLOUD_PROJECT"), code=2, settings=("project=null",)),
    "no-zone": Trouble(("cluster.zones is empty", "set PODLAUNCH_ZONES"), code=2, settings=("zones=[]",)),
    "api-disabled": Trouble(
        ("of my-project in all zones", "the Cloud TPU API is disabled", "gcloud services enable tpu"), {"preset": "api-disabled"}
    ),
    "may-not-look": Trouble(("permission denied", "tpu.nodes.get", "roles/tpu.admin"), {"preset": "permission"}),
    "may-not-create": Trouble(("in us-central2-b", "permission denied", "roles/tpu.admin"), {"preset": "permission", "method": "Create*"}),
    "quota-0": Trouble(
        ("quota used up", "Limit: 0 in region", "quota used up in us-central2; quota used up in us-east5", "ask for more quota"),
        {"preset": "quota"},
    ),
    "stockout": Trouble(("no capacity", "stockout in us-central2-b; stockout in us-east5-b", "add zones"), {"preset": "stockout"}),
    "stockout-of-plain-nodes": Trouble(
        ("no capacity", "stockout in us-central2-b; stockout in us-east5-b", "add zones"), {"preset": "stockout"}, kept=PLAIN
    ),
    "reservation": Trouble(
        ("no reserved capacity", "reservation full in us-central2-b", "check the reservation"), {"preset": "reserved-stockout"}
    ),
    "not-in-zone": Trouble(
        ("not available in this zone", "not available in us-central2-b; not available in us-east5-b", "choose another zone"),
        {"preset": "not-in-zone"},
        code=2,
    ),
    "zone-denied": Trouble(
        ("Permission denied on 'locations/", "not available in us-central2-b; not available in us-east5-b"),
        {"preset": "zone-denied", "method": "Create*"},
        code=2,
    ),
    "runtime-version": Trouble(
        ("in us-central2-b", "unknown runtime version", '"tpu-vm-nowhere"', "leave runtime_version out"),
        code=2,
        settings=("runtime_version=tpu-vm-nowhere",),
    ),
    "preempted": Trouble(
        ("not READY in time", "preempted while it was made in us-central2-b", "in us-east5-b"),
        {"preset": "preempted-while-creating"},
        settings=("--timeout", "4s"),
    ),
    "preempted-plain-nodes": Trouble(
        ("not READY in time", "preempted while it was made in us-central2-b"),
        {"preset": "preempted-while-creating"},
        settings=("--timeout", "4s"),
        kept=PLAIN,
    ),
}


LONG = ("stockout-of-plain-nodes", "preempted-plain-nodes", "zone-denied", "not-in-zone")
"""As others that run always, by another way of asking or with other words."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in TROUBLES])
def test_refusal_is_one_line_leaves_nothing_and_the_next_start_works(user: User, name: str) -> None:
    trouble = TROUBLES[name]
    before = user.remembered()
    if trouble.fault is not None:
        user.ask("POST", "/faults", **trouble.fault)
    line = error_of(user.start(name, BOTH, *trouble.kept, *trouble.settings), trouble.code)
    user.ask("DELETE", "/faults")
    at = 0
    for words in trouble.words:
        assert words in line[at:], line
        at = line.index(words, at)
    assert user.nodes(name) == []
    assert user.remembered() == before
    again = user.start(name, BOTH, *trouble.kept)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith(f"{name}-0  us-central2-b  READY")


def test_spot_without_quota_leaves_on_demand_open(user: User) -> None:
    for region in ("us-central2", "us-east5"):
        user.ask("POST", "/quota", place=region, generation="v4", amount=0, spot=True)
    line = error_of(user.start("spotless", BOTH, "provisioning=spot"), 1)
    assert "TPUV4sPreemptiblePodPerProjectPerRegionForTPUAPI" in line
    assert user.nodes("spotless") == []
    assert user.start("spotless", BOTH).returncode == 0


def test_full_first_zone_gives_way_to_the_next(user: User) -> None:
    user.ask("POST", "/faults", preset="stockout", zone=ZONES[0])
    done = user.start("second", BOTH)
    user.ask("DELETE", "/faults")
    assert done.stdout.startswith("second-0  us-east5-b  READY"), done


def test_preempted_in_one_zone_while_it_was_made_comes_up_in_the_next(user: User) -> None:
    user.ask("POST", "/faults", preset="preempted-while-creating", count=1)
    assert user.start("third", BOTH).stdout.startswith("third-0  us-east5-b  READY")


def test_queued_request_that_waits_too_long_is_a_stockout(user: User) -> None:
    user.ask("POST", "/capacity", zone=ZONES[0], what="v4", amount=0)
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(user.start, "waits", f"zones=[{ZONES[0]}]", "valid_until=1h")
        while "waits" not in user.remembered():  # which is just before the request
            assert not starting.done(), starting.result()
            time.sleep(0.05)
        while not starting.done():
            user.ask("POST", "/clock", advance=3600)
            time.sleep(0.2)
        line = error_of(starting.result(), 1)
    user.ask("POST", "/capacity", zone=ZONES[0], what="v4", amount=None)
    assert "no capacity: it waited for capacity until its time was over" in line
    assert user.nodes("waits") == []
    assert user.start("waits", f"zones=[{ZONES[0]}]").returncode == 0


def test_name_of_a_slice_that_is_not_ours_is_refused_and_theirs_stays(user: User) -> None:
    channel = grpc.insecure_channel(user.endpoint)
    client = tpu_v2.TpuClient(transport=TpuGrpcTransport(channel=channel))
    theirs = tpu_v2.Node(accelerator_type="v4-8", runtime_version="tpu-ubuntu2204-base")
    parent = f"projects/my-project/locations/{ZONES[0]}"
    client.create_node(parent=parent, node_id="taken-0", node=theirs, timeout=10)
    line = error_of(user.start("taken", BOTH), 1)
    assert "taken-0 in us-central2-b: the name is taken" in line
    assert "this cluster did not make it" in line
    assert user.nodes("taken") == ["taken-0"]
    assert "taken" not in user.remembered()
    client.delete_node(name=f"{parent}/nodes/taken-0", timeout=10)
    channel.close()
    deadline = time.monotonic() + 20
    while user.nodes("taken"):
        assert time.monotonic() < deadline
    assert user.start("taken", BOTH).returncode == 0


def test_another_kind_or_place_under_the_same_name_is_refused_and_stop_finds_what_is_there(user: User) -> None:
    assert user.start("again", f"zones=[{ZONES[0]}]").returncode == 0
    line = error_of(user.start("again", f"zones=[{ZONES[1]}]"), 1)
    assert "are up already: v4-8 of project my-project in us-central2-b" in line
    assert user.nodes("again") == ["again-0"]
    assert user.start("again", f"zones=[{ZONES[0]}]").returncode == 0, "the same again is what is there"
    assert user.tpu("stop", "again", "-y").returncode == 0
    assert (user.nodes("again"), "again" in user.remembered()) == ([], False)


@pytest.fixture
def token_server() -> Iterator[str]:
    """What Google's token endpoint answers about a service account that was deleted."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = b'{"error": "invalid_grant", "error_description": "Invalid grant: account not found"}'
            self.send_response(400)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """No line a request."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/token"
    server.shutdown()
    server.server_close()
    thread.join()


def key_file(path: Path, token_uri: str) -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()
    account = {"type": "service_account", "client_email": "a@my-project.iam.gserviceaccount.com", "private_key": text}
    path.write_text(json.dumps({**account, "private_key_id": "1", "token_uri": token_uri}))
    return str(path)


@pytest.mark.parametrize("kind", ["none", "missing", "broken", "refused"])
def test_bad_credentials_fail_at_once_with_one_line(tmp_path: Path, token_server: str, kind: str) -> None:
    user = User(tmp_path)  # no endpoint: Google's own, which is not reached
    (tmp_path / "broken.json").write_text('{"type": "serv')
    expected, place = {
        "none": ("Your default credentials were not found", None),
        "missing": ("was not found", str(tmp_path / "nowhere.json")),
        "broken": ("is not a valid json file", str(tmp_path / "broken.json")),
        "refused": ("invalid_grant: Invalid grant: account not found", key_file(tmp_path / "key.json", token_server)),
    }[kind]
    before = time.monotonic()
    done = user.start("mine", BOTH, env={} if place is None else {"GOOGLE_APPLICATION_CREDENTIALS": place})
    line = error_of(done, 1)
    assert time.monotonic() - before < 30
    assert "project my-project: no usable credentials" in line
    assert expected in line
    assert "gcloud auth application-default login" in line
    assert user.remembered() == []


@pytest.fixture
def home() -> Iterator[Home]:
    base = Path(tempfile.mkdtemp(prefix="podlaunch-test-"))
    (base / "work").mkdir()
    made = Home(base / "work", base / "state")
    yield made
    assert made.tpu("stop", "-y", limit=120).returncode == 0
    assert made.processes() == []
    shutil.rmtree(base)


@pytest.mark.long
def test_cluster_shows_what_its_autoscaler_was_refused_until_it_gets_its_slice(home: Home) -> None:
    def lines() -> list[str]:
        (row,) = json.loads(home.tpu("status", "--json").stdout)
        return [str(line) for line in row["refusals"]]

    def says(pattern: str) -> bool:
        return any(re.fullmatch(pattern, line) for line in lines())

    assert home.tpu("emulator", "start").returncode == 0
    assert home.tpu("emulator", "fault", "permission", "--method", "Create*").returncode == 0
    started = home.tpu("start", "--slices", "1", "--detach")
    assert started.returncode == 0, started.stderr
    eventually(
        lambda: says(r"local-\S+ in us-central2-b: permission denied: .*; grant roles/tpu.admin.*"), "the missing permission", limit=60
    )
    assert home.tpu("emulator", "fault", "stockout").returncode == 0
    assert home.tpu("emulator", "fault", "clear", "1").returncode == 0
    eventually(lambda: says(r"stockout in us-central2-b, next try in \d+ s"), "the stockout", limit=60)
    assert "stockout in us-central2-b, next try in" in home.tpu("status").stdout
    assert json.loads(home.tpu("emulator", "status", "--json").stdout)["nodes"] == []
    assert home.tpu("emulator", "fault", "clear").returncode == 0

    def up() -> bool:
        (row,) = json.loads(home.tpu("status", "--json").stdout)
        return [one["hosts_ready"] for one in row["slices"]] == [2] and row["refusals"] == []

    eventually(up, "the slice, without a word of refusal", limit=150)
