"""Client, head and hosts agree on Ray, Python and podlaunch, or say so in one line."""

import dataclasses
import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from cluster import clusters
from cluster.clusters import Cluster
from cluster.compute import Instance
from cluster.config import ClusterConfig
from cluster.errors import ClusterError
from cluster.head import read_settings
from cluster.head_here import HereHead
from cluster.secret_place import SecretPlace
from cluster.state import cluster_dir
from cluster.versions import Versions, disagreement, maker, own_versions
from cluster.vm.bundle import Bundle
from cluster.vm.head_agent import VmHeadSettings
from cluster.vm.host_agent import refusal
from cluster.vm.metadata import HEAD_ATTRIBUTE
from cluster.vm.settings import HostSettings

OWN = own_versions()
CONFIG = ClusterConfig(name="mine", cloud="emulated", accelerator_type="v4-16")
SETTINGS = HostSettings("mine", "h:1", SecretPlace(file="/t"), "v4-16", "podlaunch-slice-v4-16", 4, versions=OWN)


def made_by(versions: Versions | None, folder: Path) -> Cluster:
    bundle = Bundle("hash", versions=versions)
    return Cluster(CONFIG, HereHead.plan(CONFIG, bundle, folder), bundle, 0.0)


def test_own_versions_are_those_of_the_packages_and_of_the_interpreter() -> None:
    assert Versions(version("podlaunch"), version("ray"), f"{sys.version_info.major}.{sys.version_info.minor}") == OWN


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"ray": "9.9.9"}, (f"Ray {OWN.ray}", "Ray 9.9.9")),
        ({"python": "3.8"}, (f"Python {OWN.python}", "Python 3.8")),
        ({"podlaunch": "9.0", "python": "3.8"}, (f"Python {OWN.python} and podlaunch {OWN.podlaunch}", "Python 3.8 and podlaunch 9.0")),
    ],
)
def test_a_disagreement_names_what_differs_on_both_sides(change: dict[str, str], words: tuple[str, str] | None) -> None:
    assert disagreement(OWN, dataclasses.replace(OWN, **change)) == words


def test_a_cluster_of_other_versions_is_refused_in_one_line_with_both_and_the_way_out(tmp_path: Path) -> None:
    clusters.check_fits(made_by(OWN, tmp_path), CONFIG)
    clusters.check_fits(made_by(None, tmp_path), CONFIG)
    with pytest.raises(ClusterError) as caught:
        clusters.check_fits(made_by(dataclasses.replace(OWN, ray="9.9.9"), tmp_path), CONFIG)
    line = str(caught.value)
    assert "\n" not in line
    for words in ("cluster 'mine' runs Ray 9.9.9", f"this machine has Ray {OWN.ray}", "tpu stop mine"):
        assert words in line


def test_versions_survive_the_record_and_the_metadata_of_a_head_and_of_hosts() -> None:
    bundle = Bundle("hash", versions=OWN)
    assert Bundle.from_dict(json.loads(json.dumps(bundle.to_dict()))) == bundle
    assert Bundle.from_dict({"hash": "hash"}).versions is None
    assert HostSettings.from_dict(json.loads(SETTINGS.to_json())) == SETTINGS
    head = VmHeadSettings(CONFIG, bundle, "owner", SecretPlace(file="/t"))
    assert VmHeadSettings.from_json(head.to_json()) == head


def test_a_record_that_makes_no_sense_names_the_version_that_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path))
    record = made_by(dataclasses.replace(OWN, podlaunch="9.0"), tmp_path).to_dict()
    record["config"]["from_the_future"] = 1
    (cluster_dir("mine") / "cluster.json").write_text(json.dumps(record))
    with pytest.raises(ClusterError, match=rf"made by podlaunch 9\.0 \(this is {OWN.podlaunch}\): unknown setting 'from_the_future'"):
        clusters.find("mine")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"bundle": {"versions": {"podlaunch": "9.0"}}, "new": 1}', r"made by podlaunch 9\.0 \(this is"),
        ('{"new": 1}', "made by another version of podlaunch"),
        ("not json", "made by another version of podlaunch"),
    ],
)
def test_a_head_vm_whose_settings_make_no_sense_names_the_version_that_made_it(text: str, words: str) -> None:
    vm = Instance("podlaunch-mine-head", "z", "RUNNING", "", "", {}, 0.0, {HEAD_ATTRIBUTE: text})
    with pytest.raises(ClusterError, match=words):
        read_settings(vm)


def test_whoever_wrote_nothing_of_it_is_another_version() -> None:
    assert maker({}) == maker({"bundle": {"hash": "x", "versions": None}}) == "another version of podlaunch"


def test_a_host_of_other_versions_refuses_in_one_line() -> None:
    assert refusal(SETTINGS, OWN) is None
    assert refusal(dataclasses.replace(SETTINGS, versions=None), OWN) is None
    line = refusal(SETTINGS, dataclasses.replace(OWN, python="3.8"))
    assert line is not None
    assert "\n" not in line
    assert f"this host has Python 3.8, cluster 'mine' runs Python {OWN.python}" in line
