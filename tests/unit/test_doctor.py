"""`tpu doctor`: what it finds wrong, and what it says to do."""

import json
import resource
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from cluster.config import ClusterConfig
from cluster.emulator.embedded import embedded_emulator
from cluster.emulator.faults import Fault
from launcher.cli.main import app
from launcher.doctor import (
    LEAST_FREE_BYTES,
    LEAST_MEMORY_BYTES,
    Finding,
    check_addresses,
    check_clock,
    check_cloud,
    check_files,
    check_folder,
    check_machine,
    check_memory,
    check_packages,
    check_python,
)

GIB = 2**30


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_this_machine_has_a_line_for_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path / "state"))
    found = {finding.name: finding for finding in check_machine()}
    assert all(found[name].well for name in ("Python", "packages", "loopback")), found
    assert all(finding.fix for finding in found.values() if not finding.well)
    result = CliRunner().invoke(app, ["doctor", "--json"], catch_exceptions=False)
    assert [row["name"] for row in json.loads(result.stdout)] == list(found)
    assert (result.exit_code == 0) is all(row["well"] for row in json.loads(result.stdout))


@pytest.mark.parametrize(("found", "well"), [((3, 10), False), ((3, 11), True), ((3, 13), True), ((3, 14), False)])
def test_python(found: tuple[int, int], well: bool) -> None:
    assert check_python(found).well is well


def test_packages_are_held_to_what_is_needed() -> None:
    needed = ["ray[default]<2.61,>=2.60", "numpy>=1.26", "wandb>=0.2 ; extra == 'wandb'"]
    assert check_packages(needed, {"ray": "2.60.0", "numpy": "2.1"}.get).well
    wrong = check_packages(needed, {"ray": "2.61.0"}.get)
    assert not wrong.well
    assert wrong.said == "ray is 2.61.0, <2.61,>=2.60 is needed; numpy is missing, >=1.26 is needed"


@pytest.mark.parametrize(
    ("usage", "well", "words"),
    [
        (Usage(100 * GIB, 40 * GIB, 60 * GIB), True, "60.0 GiB free of 100"),
        (Usage(100 * GIB, 96 * GIB, 4 * GIB), False, "Ray would place nothing"),
        (Usage(20 * GIB, 16 * GIB, LEAST_FREE_BYTES - 1), False, "GiB free"),
    ],
)
def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, usage: Usage, well: bool, words: str) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    finding = check_folder("cache", tmp_path / "not" / "yet")
    assert finding.well is well
    assert words in finding.said
    assert "PODLAUNCH_CACHE_DIR" in finding.fix


def test_a_folder_that_takes_no_files_is_told() -> None:
    finding = check_folder("state directory", Path("/proc/podlaunch"))
    assert not finding.well
    assert "PODLAUNCH_STATE_DIR" in finding.fix


def test_limits() -> None:
    assert check_files((resource.RLIM_INFINITY, resource.RLIM_INFINITY)).well
    assert check_files((256, 4096)).fix == "ulimit -n 4096"
    assert not check_memory(LEAST_MEMORY_BYTES - 1).well
    assert not check_addresses("192.0.2.1").well, "an address of nobody's"


def test_a_clock_that_goes_wrong_is_told() -> None:
    assert check_clock("http://x", lambda _: -3.0).well
    ahead = check_clock("http://x", lambda _: 3600.0)
    assert (ahead.well, ahead.said) == (False, "+3600 s from the service's")

    def silent(_: str) -> float:
        raise OSError("no route")

    assert "http://x does not answer: no route" in check_clock("http://x", silent).said


def test_services_are_asked_and_their_refusals_shown_with_what_to_do() -> None:
    with embedded_emulator() as emulator:
        settings = {"name": "mine", "project": "my-project", "zones": ["us-central2-b"], "accelerator_type": "v4-16", "head": "vm"}
        at = {"endpoint": emulator.endpoint, "secrets_endpoint": emulator.endpoint, "compute_endpoint": emulator.rest}
        config = ClusterConfig.from_dict({**settings, **at})

        def look() -> dict[str, Finding]:
            return {finding.name: finding for finding in check_cloud(config)}

        found = look()
        assert found["Cloud TPU API"].said == "project my-project: 0 TPU VMs in us-central2-b"
        assert all(found[name].well for name in ("Cloud TPU API", "Compute Engine API", "Secret Manager API", "clock"))
        assert not found["bucket"].well
        words = "Cloud TPU API has not been used in project 1 before or it is disabled."
        emulator.cloud.faults.add(doctor_fault(words))
        refused = look()["Cloud TPU API"]
        assert not refused.well
        assert "the Cloud TPU API is disabled" in refused.said
        assert refused.fix == "run: gcloud services enable tpu.googleapis.com"


def doctor_fault(words: str) -> Fault:
    return Fault.from_dict({"effect": "error", "method": "ListNodes", "code": 7, "words": words})
