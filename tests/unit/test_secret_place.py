"""Where secrets are, and who waits for them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import ClusterError
from cluster.secret_place import SecretPlace
from cluster.vm.patience import patiently


def test_a_file_is_used_as_it_is_and_deleted_once(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("the-token")
    place = SecretPlace.from_json(SecretPlace(file=str(path)).to_json())
    assert place.read() == "the-token"
    assert place.local_file(tmp_path / "elsewhere") == path
    place.delete()
    place.delete()
    assert not path.exists()


def test_only_names_and_addresses_are_written_down() -> None:
    place = SecretPlace(secret="podlaunch-c-token", project="p")
    assert json.loads(place.to_json()) == {"secret": "podlaunch-c-token", "project": "p"}
    assert SecretPlace.from_json(place.to_json()) == place


def test_a_boot_waits_for_rights_that_come_late() -> None:
    now, answers = [0.0], [ClusterError("no"), ClusterError("not yet"), None]

    def ask() -> str:
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        return "there"

    def sleep(seconds: float) -> None:
        now[0] += seconds

    assert patiently(ask, clock=lambda: now[0], sleep=sleep) == "there"
    assert now == [3.0]


def test_a_boot_does_not_wait_for_ever() -> None:
    now = [0.0]

    def ask() -> str:
        raise ClusterError("never")

    def sleep(seconds: float) -> None:
        now[0] += seconds

    with pytest.raises(ClusterError, match="never"):
        patiently(ask, patience=100.0, clock=lambda: now[0], sleep=sleep)
    assert 70.0 <= now[0] <= 100.0


def test_commands_and_agents_of_a_local_cluster_import_no_client_of_compute_engine_or_secret_manager() -> None:
    ours = "launcher.app, launcher.cli.main, launcher.gang.runner, cluster.head_here, cluster.ending"
    ours += ", cluster.vm.head_agent, cluster.vm.host_agent"
    theirs = ("google.cloud.compute", "google.cloud.secretmanager")
    seen = f"[name for name in sys.modules if name.startswith({theirs})]"
    found = subprocess.run([sys.executable, "-c", f"import sys, {ours}; print({seen})"], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
