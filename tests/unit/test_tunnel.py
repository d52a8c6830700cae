"""The tunnel to a head VM, with a `gcloud` that really forwards the port, or fails the way the real one does."""

import os
import signal
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster import processes
from cluster.tunnel import Tunnel, TunnelError, accepts
from tests.stub_gcloud import failing_gcloud, forwarding_gcloud


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"the head")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def remote_port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture
def tunnel(tmp_path: Path, remote_port: int) -> Iterator[Tunnel]:
    made = Tunnel(tmp_path, "podlaunch-mine-head", "us-east5-a", "my-project", remote_port)
    yield made
    made.close()
    assert list(processes.members(made.marker)) == []


def fetch(port: int) -> bytes:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{port}/", timeout=5) as answer:
        return bytes(answer.read())


def test_a_tunnel_leads_to_the_head_and_is_reused_and_ended(tunnel: Tunnel, tmp_path: Path) -> None:
    env = forwarding_gcloud(tmp_path / "bin")
    port = tunnel.open(env=env)
    assert fetch(port) == b"the head"
    assert tunnel.open(env=env) == port
    (call,) = (tmp_path / "bin" / "calls").read_text().splitlines()
    assert call.startswith(
        "compute ssh podlaunch-mine-head --zone us-east5-a --project my-project --tunnel-through-iap --quiet -- -N -L "
        f"127.0.0.1:{port}:127.0.0.1:{tunnel.remote_port}"
    )
    tunnel.close()
    assert not accepts(port)
    assert list(processes.members(tunnel.marker)) == []
    tunnel.close()


def test_a_tunnel_that_died_is_opened_again(tunnel: Tunnel, tmp_path: Path) -> None:
    env = forwarding_gcloud(tmp_path / "bin")
    tunnel.open(env=env)
    for process in processes.members(tunnel.marker):
        process.send_signal(signal.SIGKILL)
        process.wait(5)
    assert fetch(tunnel.open(env=env)) == b"the head"
    assert len((tmp_path / "bin" / "calls").read_text().splitlines()) == 2


def test_two_commands_at_once_share_one_tunnel(tunnel: Tunnel, tmp_path: Path) -> None:
    env = forwarding_gcloud(tmp_path / "bin")
    ports: list[int] = []
    threads = [threading.Thread(target=lambda: ports.append(tunnel.open(env=env))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ports) == 3
    assert len(set(ports)) == 1
    assert len((tmp_path / "bin" / "calls").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "expected", "passing"),
    [
        ("ERROR: (gcloud.compute.ssh) You do not currently have an active account selected.", "gcloud auth login", False),
        ("ERROR: (gcloud.compute.start-iap-tunnel) Error while connecting [4033: 'not authorized'].", "roles/iap.tunnelResource", False),
        ("ERROR: Required 'compute.instances.get' permission for 'projects/p/zones/z/instances/h'", "may not use the VM", False),
        ("Error while connecting [4003: 'failed to connect to backend']. (Failed to connect to port 22)", "35.235.240.0/20", True),
        ("Error while connecting [4047: 'Failed to lookup instance'].", "not running yet", True),
        ("ubuntu@compute.123: Permission denied (publickey).", "does not take this SSH key", True),
        ("ERROR: (gcloud.compute.ssh) Could not fetch resource:\n - The resource 'h' was not found", "tpu start", False),
        ("line one\nsomething new", "something new", False),
    ],
)
def test_what_gcloud_refuses_is_one_line_with_the_next_step(
    tunnel: Tunnel, tmp_path: Path, words: str, expected: str, passing: bool
) -> None:
    with pytest.raises(TunnelError) as error:
        tunnel.open(env=failing_gcloud(tmp_path / "bin", words))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.passing is passing


def test_without_gcloud_the_line_says_what_to_install(tunnel: Tunnel, tmp_path: Path) -> None:
    with pytest.raises(TunnelError, match="gcloud is not installed"):
        tunnel.open(env={**os.environ, "PATH": str(tmp_path)})


def test_a_gcloud_that_hangs_is_given_up(tunnel: Tunnel, tmp_path: Path) -> None:
    env = forwarding_gcloud(tmp_path / "bin", hang=True)
    ticks = iter(range(1000))
    with pytest.raises(TunnelError, match="did not connect in time"):
        tunnel.open(env=env, limit=3.0, clock=lambda: next(ticks))
    assert list(processes.members(tunnel.marker)) == []
