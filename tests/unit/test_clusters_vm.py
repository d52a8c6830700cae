"""A cluster whose head is a VM: the real clients of Compute Engine and Secret Manager against the embedded emulator, and in place of the
VM's processes a server that answers like Ray's dashboard, to whoever shows the token.
"""

import dataclasses
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster import clusters
from cluster.clusters import Cluster, Outside
from cluster.config import ClusterConfig
from cluster.emulator.embedded import Embedded, embedded_emulator
from cluster.emulator.hosts import NoHosts
from cluster.emulator.model import InstanceRecord, Machine
from cluster.errors import ClusterError, ConfigError
from cluster.head import head_requests, head_spec
from cluster.heads import DASHBOARD_PORT
from cluster.secret_place import SecretPlace
from cluster.services import Services, Where, connect
from cluster.state import clusters_dir
from cluster.tpu.slices import CREATOR_LABEL, OWNER_LABEL
from cluster.vm.bundle import Bundle
from cluster.vm.head_agent import VmHeadSettings, end_from_vm, prepare
from cluster.vm.metadata import HEAD_ATTRIBUTE
from launcher import jobs
from launcher.cli.main import app
from launcher.runs import RunDirectory

ZONE = "us-central2-b"
BUNDLE = Bundle("bundle-hash")


class Dashboard(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer([] if self.path == "/api/jobs/" else {"data": {"result": {"result": []}}})

    def do_POST(self) -> None:
        self.server.posted.append(self.rfile.read(int(self.headers["Content-Length"])).decode())  # type: ignore[attr-defined]
        self._answer({})

    def _answer(self, value: Any) -> None:
        known = re.fullmatch(r"Bearer [0-9a-f]{64}", self.headers.get("Authorization", "")) is not None
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode() if known else b"")

    def log_message(self, *_: object) -> None:
        pass


class HeadHosts(NoHosts):
    """An instance that is started answers at its address; slices have no processes."""

    def __init__(self) -> None:
        self.servers: dict[str, ThreadingHTTPServer] = {}
        self.posted: list[str] = []

    def start(self, machine: Machine) -> None:
        if isinstance(machine, InstanceRecord) and machine.uid not in self.servers:
            server = ThreadingHTTPServer((machine.hosts[0].ip, DASHBOARD_PORT), Dashboard)
            server.posted = self.posted  # type: ignore[attr-defined]
            self.servers[machine.uid] = server
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def halt(self, machine: Machine) -> None:
        server = self.servers.pop(machine.uid, None)
        if server is not None:
            server.shutdown()
            server.server_close()

    def stop(self, machine: Machine) -> None:
        self.halt(machine)

    def close(self) -> None:
        for server in self.servers.values():
            server.shutdown()
            server.server_close()


@dataclasses.dataclass
class Google:
    emulator: Embedded
    hosts: HeadHosts

    @property
    def config(self) -> ClusterConfig:
        return ClusterConfig(
            name="mine",
            project="my-project",
            zones=[ZONE],
            accelerator_type="v4-16",
            head_access="direct",
            endpoint=self.emulator.endpoint,
            secrets_endpoint=self.emulator.endpoint,
            compute_endpoint=self.emulator.rest,
        )

    @property
    def services(self) -> Services:
        return connect(self.config)

    def left(self) -> list[str]:
        """Names of everything that exists, whoever owns it."""
        return [one.name for one in self.services.instances.list({})] + self.services.secrets.list({})


@pytest.fixture
def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Google]:
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path / "state"))
    hosts = HeadHosts()
    with embedded_emulator(hosts=hosts, database=tmp_path / "cloud.sqlite3") as emulator:
        yield Google(emulator, hosts)


def outside(connect: Callable[[Where], Services] = connect) -> Outside:
    return Outside(connect, lambda *_: BUNDLE)


def up(config: ClusterConfig, outside: Outside | None = None) -> Cluster:
    return clusters.up(config, lambda _: None, outside=outside or Outside(make_bundle=lambda *_: BUNDLE))


class Interrupt:
    """Lets the `n`-th call of a service end as Ctrl-C does, before it is sent or after it was answered."""

    def __init__(self, n: int, *, after: bool) -> None:
        self.n, self.after, self.calls = n, after, 0

    def connect(self, where: Where) -> Services:
        real = connect(where)
        return Services(lambda: self.wrap(real.instances), lambda: self.wrap(real.secrets))

    def wrap(self, service: Any) -> Any:
        return _Interrupted(service, self)

    def call(self, method: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        self.calls += 1
        mine = self.calls == self.n
        if mine and not self.after:
            raise KeyboardInterrupt
        answer = method(*arguments, **more)
        if mine:
            raise KeyboardInterrupt
        return answer


class _Interrupted:
    def __init__(self, service: Any, interrupt: Interrupt) -> None:
        self._service, self._interrupt = service, interrupt

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._service, name)
        return lambda *arguments, **more: self._interrupt.call(method, *arguments, **more)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("then", ["start", "stop"])
def test_an_interrupt_at_any_call_leaves_what_the_next_command_deals_with(google: Google, after: bool, then: str) -> None:
    for n in range(1, 50):
        interrupt = Interrupt(n, after=after)
        try:
            up(google.config, outside(interrupt.connect))
        except KeyboardInterrupt:
            if then == "start":
                cluster = up(google.config)
                assert cluster.http.answers()
                assert google.services.secrets.read("podlaunch-mine-token") == cluster.token_file.read_text()
        known = clusters.find("mine")
        assert known is not None or google.left() == [], f"nobody knows of it after call {n}"
        if known is not None:
            clusters.stop(known, lambda _: None)
        assert google.left() == [], f"after call {n}"
        if interrupt.calls < n:
            assert n > 4, "a start makes at least the look-up, the secret, the VM and the wait for it"
            return
    raise AssertionError("a start does not come to its end")


def test_nothing_that_travels_or_is_shown_holds_the_token(google: Google) -> None:
    cluster = up(google.config)
    token = cluster.token_file.read_text()
    assert len(bytes.fromhex(token)) == 32
    assert cluster.token_file.stat().st_mode & 0o777 == 0o600
    (vm,) = google.services.instances.list({OWNER_LABEL: "mine"})
    labels = google.services.secrets.list_labels({})
    shown = [repr(vm), repr(labels), json.dumps(cluster.to_dict()), repr(cluster), *head_json(google.config)]
    assert all(token not in text for text in shown)
    settings = VmHeadSettings.from_json(vm.metadata[HEAD_ATTRIBUTE])
    assert settings.token == SecretPlace(secret="podlaunch-mine-token", project="my-project", endpoint=google.config.secrets_endpoint)


def head_json(config: ClusterConfig) -> list[str]:
    return [json.dumps(request) for request in head_requests(config, BUNDLE, clusters_dir() / "mine", "0123456789ab")]


def test_a_head_that_is_gone_is_made_again_with_another_token(google: Google) -> None:
    first = up(google.config)
    token = first.token_file.read_text()
    google.services.instances.delete(ZONE, "podlaunch-mine-head")
    while google.services.instances.get(ZONE, "podlaunch-mine-head") is not None:
        pass
    assert not first.alive()
    second = up(google.config)
    assert second.alive()
    assert second.token_file.read_text() != token
    assert google.services.secrets.read("podlaunch-mine-token") == second.token_file.read_text()


def test_what_runs_were_given_outlives_the_head_vm(google: Google, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    place, _ = jobs.store_secrets(up(google.config), RunDirectory(tmp_path / "my.run"), ["HF_TOKEN"])
    google.services.instances.delete(ZONE, "podlaunch-mine-head")
    while google.services.instances.get(ZONE, "podlaunch-mine-head") is not None:
        pass
    again = up(google.config)
    assert place is not None
    assert json.loads(place.read()) == {"HF_TOKEN": "s3cret"}
    clusters.stop(again, lambda _: None)
    assert google.left() == []


def test_a_head_vm_is_told_what_runs_beside_ray(google: Google, tmp_path: Path) -> None:
    clusters.up(google.config, lambda _: None, companion=["-m", "beside"], outside=Outside(make_bundle=lambda *_: BUNDLE))
    (vm,) = google.services.instances.list({OWNER_LABEL: "mine"})
    settings = VmHeadSettings.from_json(vm.metadata[HEAD_ATTRIBUTE])
    assert settings.companion == ["-m", "beside"]
    folder = tmp_path / "vm"
    folder.mkdir()
    assert prepare(settings, "127.0.0.1", folder).companion == ["-m", "beside"]


def test_another_machine_of_the_project_joins_by_the_head_vm(google: Google, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = up(google.config).token_file.read_text()
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path / "another"))
    assert clusters.find("mine") is None
    (seen,) = clusters.list_in_project(google.config)
    assert (seen.name, seen.config) == ("mine", google.config)
    assert clusters.find("mine") is None, "a look keeps nothing"
    joined = up(google.config)
    assert joined.token_file.read_text() == token
    assert joined.http.answers()
    assert google.left() == ["podlaunch-mine-head", "podlaunch-mine-token"], "nothing was made twice"


def test_a_vm_of_somebody_else_with_that_name_is_left_alone(google: Google) -> None:
    spec = head_spec(dataclasses.replace(google.config, name="mine"), BUNDLE, clusters_dir() / "mine", "0123456789ab")
    spec["labels"] = {"team": "other"}
    services = google.services
    services.instances.wait_operation(ZONE, services.instances.insert(ZONE, spec), 30.0)
    with pytest.raises(ClusterError, match=r"did not make; choose another cluster\.name"):
        up(google.config)
    known = clusters.find("mine")
    assert known is not None
    clusters.stop(known, lambda _: None)
    assert google.left() == ["podlaunch-mine-head"]


def test_secrets_of_runs_go_to_secret_manager_and_go_with_the_cluster(
    google: Google, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    cluster = up(google.config)
    for job in ("my.run", "my.run-1"):
        place, names = jobs.store_secrets(cluster, RunDirectory(tmp_path / "my.run"), ["HF_TOKEN", "NOT_SET"])
        jobs.post(cluster.http, RunDirectory(tmp_path / "my.run"), job, place, "index")
        assert names == ["HF_TOKEN"]
    assert all("s3cret" not in posted for posted in google.hosts.posted)
    assert json.loads(google.services.secrets.read("podlaunch-mine-run-my_run")) == {"HF_TOKEN": "s3cret"}
    assert not (cluster.folder / "secrets").exists()
    clusters.stop(cluster, lambda _: None)
    assert google.left() == []


def test_the_head_prepares_from_its_metadata_and_keeps_its_port(google: Google, tmp_path: Path) -> None:
    config = dataclasses.replace(google.config, autostop="2h", head_access="tunnel")
    up(google.config)
    token = google.services.secrets.read("podlaunch-mine-token")
    place = SecretPlace(secret="podlaunch-mine-token", project="my-project", endpoint=config.secrets_endpoint)
    settings = VmHeadSettings.from_json(VmHeadSettings(config, BUNDLE, "0123456789ab", place).to_json())
    folder = tmp_path / "vm"
    folder.mkdir()
    head = prepare(settings, "127.0.0.1", folder)
    assert (folder / "token").read_text() == token
    assert (folder / "token").stat().st_mode & 0o777 == 0o600
    assert (head.dashboard_ip, head.dashboard_port, head.autostop_s) == ("127.0.0.1", DASHBOARD_PORT, 7200.0)
    written = (folder / "autoscaler.yaml").read_text()
    assert token not in written
    assert "podlaunch-mine-token" in written
    assert prepare(settings, "127.0.0.1", folder).gcs_port == head.gcs_port
    assert prepare(dataclasses.replace(settings, config=google.config), "127.0.0.1", folder).dashboard_ip == "127.0.0.1"


def test_a_cluster_that_ended_itself_is_told_and_started_again(google: Google) -> None:
    config = dataclasses.replace(google.config, autostop="2h")
    cluster = up(config)
    assert clusters.notice_autostop(cluster).ended is None
    end_from_vm(config)
    while google.left():
        pass
    noticed = clusters.notice_autostop(cluster)
    assert noticed.ended is not None
    assert noticed.ended.startswith("stopped by autostop")
    again = clusters.find("mine")
    assert again is not None
    assert again.ended == noticed.ended
    assert up(config).ended is None


def test_a_lost_head_is_not_taken_for_an_autostop(google: Google) -> None:
    cluster = up(dataclasses.replace(google.config, autostop="2h"))
    google.services.instances.delete(ZONE, "podlaunch-mine-head")
    while cluster.alive():
        pass
    assert clusters.notice_autostop(cluster).ended is None, "its token is still there"


def test_another_autostop_for_a_running_cluster_is_refused(google: Google) -> None:
    up(google.config)
    with pytest.raises(ClusterError, match="is up without autostop, this asks for 2h"):
        up(dataclasses.replace(google.config, autostop="2h"))


def test_a_cluster_on_google_without_a_bucket_is_refused_before_anything_is_made(google: Google) -> None:
    with pytest.raises(ConfigError, match=r"give cluster.bucket"):
        clusters.up(google.config, lambda _: None)
    assert google.left() == []
    assert clusters.find("mine") is None


def test_commands_show_and_delete_orphaned_heads_and_secrets(google: Google, tmp_path: Path) -> None:
    up(google.config)
    (clusters_dir() / "mine" / "cluster.json").unlink()
    up(dataclasses.replace(google.config, name="other"))  # leads the commands to the project
    strange = head_spec(dataclasses.replace(google.config, name="far"), BUNDLE, clusters_dir() / "far", "f" * 12)
    assert strange["labels"][CREATOR_LABEL] == "f" * 12
    services = google.services
    services.instances.wait_operation(ZONE, services.instances.insert(ZONE, strange), 30.0)

    rows = json.loads(tpu("status", "--json"))
    kinds = {(row["kind"], row.get("name"), row.get("elsewhere")) for row in rows}
    assert kinds == {("cluster", "other", False), ("cluster", "far", True), ("orphans", None, None)}
    assert {one["name"]: (one["type"], one["ours"]) for one in rows[-1]["slices"]} == {
        "podlaunch-mine-head": ("head VM", True),
        "podlaunch-mine-token": ("secret", True),
    }
    text = tpu("status")
    assert "made on another machine" in text
    assert "podlaunch-mine-head" in text
    assert "2 head VMs and secrets are being deleted" in tpu("stop", "--orphans", "-y")
    assert set(google.left()) == {"podlaunch-other-head", "podlaunch-other-token", "podlaunch-far-head"}
    assert "cluster 'far' is stopped" in tpu("stop", "far", "-y"), "a cluster of another machine is found by its head"
    assert "cluster 'other' is stopped" in tpu("stop", "other", "-y")
    assert google.left() == []


def test_the_dashboards_token_is_printed_only_when_it_is_asked_for(google: Google) -> None:
    cluster = up(google.config)
    token = cluster.token_file.read_text()
    said = tpu("dashboard")
    assert f":{DASHBOARD_PORT}" in said
    assert token not in said
    assert str(cluster.token_file) in said.replace("\n", "")
    assert token in tpu("dashboard", "mine", "--show-token").replace("\n", "")


def tpu(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout
