"""The table of ports: what may be open without authentication, its document, and what status says of a cluster that is open wider."""

from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from cluster.listeners import AGENT, GCS, LISTENERS, RAYLET, TRAINING, WORKER, Auth, Scope, document, owner_of, wider_than_needed

ROOT = Path(__file__).resolve().parents[2]
GOOGLE = {"name": "mine", "project": "my-project", "zones": ["us-east5-a"], "accelerator_type": "v4-16"}


def test_the_document_is_the_table() -> None:
    assert (ROOT / "docs" / "ports-and-firewall.md").read_text() == document(), (
        "run: python -m cluster.listeners > docs/ports-and-firewall.md"
    )


def test_beyond_loopback_only_metrics_and_what_joins_training_processes_asks_nobody() -> None:
    opened = {row.name for row in LISTENERS if row.auth is Auth.NONE and row.scope is not Scope.LOOPBACK}
    assert opened == {
        "dashboard metrics",
        "autoscaler metrics",
        "agent metrics",
        "JAX coordinator",
        "gloo",
        "MEGASCALE coordinator",
        "TPU runtime",
    }
    assert {row.scope for row in LISTENERS if row.auth is Auth.USER} == {Scope.LOOPBACK}


def test_every_row_has_a_name_of_its_own_and_grpc_with_a_token_names_its_services() -> None:
    assert len({row.name for row in LISTENERS}) == len(LISTENERS)
    assert [row.name for row in LISTENERS if (row.protocol, row.auth) == ("gRPC", Auth.TOKEN) and not row.serves] == []


@pytest.mark.parametrize(
    ("command", "owner"),
    [
        ("/venv/lib/ray/core/src/ray/gcs/gcs_server --log_dir=/tmp/x", GCS),
        ("/venv/lib/ray/core/src/ray/raylet/raylet --raylet_socket_name=/tmp/x", RAYLET),
        ("/venv/ray/raylet/raylet --dashboard_agent_command=/venv/bin/python -u /venv/ray/dashboard/agent.py --node", RAYLET),
        ("/venv/bin/python -u /venv/ray/dashboard/agent.py --node-ip-address=127.0.0.2", AGENT),
        ("ray::DashboardAgent", AGENT),
        ("ray::Runner.next_events", WORKER),
        ("ray::IDLE", WORKER),
        ("python -m launcher.training.child /runs/a --attempt 0", TRAINING),
        ("python -m launcher.training.warm", TRAINING),
        ("python -m cluster.vm.host_agent", None),
        ("python -m http.server", None),
    ],
)
def test_a_process_is_known_by_its_command_line(command: str, owner: object) -> None:
    assert owner_of(command) is owner


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, []),
        ({"head_access": "direct"}, ["cluster.head_access=direct"]),
        ({"head_external_ip": True}, ["cluster.head_external_ip=true"]),
        ({"head": "here"}, []),
        ({"cloud": "emulated", "head": "vm"}, []),
    ],
)
def test_status_warns_of_a_cluster_that_is_open_wider_than_the_table_says(settings: dict[str, object], words: list[str]) -> None:
    lines = list(wider_than_needed(ClusterConfig.from_dict({**GOOGLE, **settings})))
    assert [word in line and "\n" not in line for word, line in zip(words, lines, strict=True)] == [True] * len(words)
