"""The admin endpoint of the emulated cloud, and whom its HTTP ports answer."""

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
from google.cloud import tpu_v2

from cluster.emulator.clock import ManualClock
from cluster.emulator.embedded import Embedded, embedded_emulator

ZONE = "us-central2-b"
PARENT = f"projects/p/locations/{ZONE}"


@pytest.fixture
def emulator() -> Iterator[Embedded]:
    with embedded_emulator(clock=ManualClock()) as running:
        running.cloud.create_node(PARENT, "n", tpu_v2.Node.pb()(accelerator_type="v4-16", runtime_version="tpu-ubuntu2204-base"))
        running.clock.advance(0)
        yield running


def ask(url: str, verb: str, path: str, values: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.request(verb, path, json.dumps(values) if values is not None else None, headers or {})
    answer = connection.getresponse()
    body = json.loads(answer.read())
    connection.close()
    return answer.status, body


def test_nodes_are_shown_with_their_hosts(emulator: Embedded) -> None:
    status, nodes = ask(emulator.admin, "GET", "/nodes")
    assert (status, nodes[0]["name"], nodes[0]["state"], len(nodes[0]["hosts"])) == (200, f"{PARENT}/nodes/n", "READY", 2)


def test_preempt_with_notice_and_a_moved_clock(emulator: Embedded) -> None:
    assert ask(emulator.admin, "POST", "/preempt", {"node": "n", "notice": 30})[0] == 200
    before = ask(emulator.admin, "GET", "/clock")[1]["now"]
    assert ask(emulator.admin, "POST", "/clock", {"advance": 30})[1]["now"] == before + 30
    assert ask(emulator.admin, "GET", "/nodes")[1][0]["state"] == "PREEMPTED"


def test_faults_are_added_listed_and_removed(emulator: Embedded) -> None:
    number = ask(emulator.admin, "POST", "/faults", {"preset": "stockout", "zone": ZONE, "count": 2})[1]["id"]
    assert ask(emulator.admin, "GET", "/faults")[1][str(number)]["count"] == 2
    assert ask(emulator.admin, "DELETE", f"/faults/{number}")[0] == 200
    assert ask(emulator.admin, "DELETE", f"/faults/{number}")[0] == 404
    assert ask(emulator.admin, "GET", "/faults") == (200, {})


def test_limits_are_set(emulator: Embedded) -> None:
    for path, values in (
        ("/capacity", {"zone": ZONE, "what": "v4", "amount": 8}),
        ("/quota", {"place": "us-central2", "generation": "v4", "amount": 32}),
        ("/reachable", {"zone": ZONE, "reachable": False}),
    ):
        assert ask(emulator.admin, "POST", path, values) == (200, {})
    assert ask(emulator.rest, "GET", f"/v2/{PARENT}/nodes") == (200, {"unreachable": [PARENT]})
    assert ask(emulator.rest, "GET", f"/v2/{PARENT}/nodes/n")[1]["error"]["status"] == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("verb", "path", "values", "status", "words"),
    [
        ("POST", "/preempt", {"node": "none"}, 404, "'none' was not found"),
        ("POST", "/preempt", {}, 400, "'node' is missing"),
        ("POST", "/host", {"node": "n", "worker": 0, "action": "paint"}, 400, "'paint' is missing or has no such value"),
        ("POST", "/faults", {"preset": "none"}, 400, "no preset"),
        ("POST", "/clock", {"advance": -1}, 400, "one way"),
        ("GET", "/none", None, 404, "there is no GET /none here"),
    ],
)
def test_wrong_request_is_refused_with_its_reason(emulator: Embedded, verb: str, path: str, values: Any, status: int, words: str) -> None:
    found, body = ask(emulator.admin, verb, path, values)
    assert found == status
    assert words in body["error"]["message"]


@pytest.mark.parametrize("headers", [{"Origin": "http://example.com"}, {"Host": "example.com:80"}], ids=["origin", "rebinding"])
def test_web_page_in_the_users_browser_is_not_answered(emulator: Embedded, headers: dict[str, str]) -> None:
    for url, path in ((emulator.admin, "/nodes"), (emulator.rest, f"/v2/{PARENT}/nodes")):
        assert ask(url, "GET", path, headers=headers)[0] == 403
