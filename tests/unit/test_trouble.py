"""A host that cannot join its cluster says why, and `tpu status` shows it."""

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.clusters import Cluster
from cluster.config import ClusterConfig
from cluster.emulator.embedded import embedded_emulator
from cluster.emulator.hosts import ProcessHosts
from cluster.head_here import HereHead
from cluster.ray_http import RayHttp
from cluster.state import cluster_dir
from cluster.tpu.api import TpuApi
from cluster.tpu.catalog import lookup
from cluster.tpu.messages import NodeRequest
from cluster.vm.bootstrap import startup_script
from cluster.vm.bundle import Bundle
from cluster.vm.metadata import GUEST_ATTRIBUTES_ENABLED, TROUBLE
from launcher.cli.main import app

ZONE = "us-central2-b"
IMAGE, WANTED = "beef" * 16, "cafe" * 16


def test_status_says_in_a_hosts_own_words_why_it_has_not_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path / "state"))
    hosts = ProcessHosts(tmp_path / "hosts", tmp_path / "state", IMAGE, os.environ)
    with embedded_emulator(hosts=hosts, database=tmp_path / "emulator.sqlite") as emulator:
        api = TpuApi(emulator.endpoint, "my-project")
        metadata = {"startup-script": startup_script(WANTED), **GUEST_ATTRIBUTES_ENABLED}
        labels = {"podlaunch-cluster": "mine"}
        api.create_node(ZONE, NodeRequest("mine-0", lookup("v4-16"), "tpu-ubuntu2204-base", labels=labels, metadata=metadata))
        limit = time.monotonic() + 30
        while len(told := api.guest_attribute(ZONE, "mine-0", TROUBLE)) < 2:
            assert time.monotonic() < limit, told
        words = f"this image holds the bundle '{IMAGE}', the cluster wants '{WANTED}' and has no bucket to get it from"
        assert sorted(told) == [f"worker 0: {words}", f"worker 1: {words}"]

        remember_a_cluster(emulator.endpoint, emulator.rest)
        monkeypatch.setattr(Cluster, "alive", lambda _: True)
        monkeypatch.setattr(RayHttp, "nodes", lambda _: [])
        (row,) = json.loads(CliRunner().invoke(app, ["status", "--json"], catch_exceptions=False).stdout)
        assert row["slices"][0]["reason"] == "2 hosts have not joined yet"
        assert sorted(row["troubles"]) == [f"mine-0 worker 0: {words}", f"mine-0 worker 1: {words}"]
        assert words in CliRunner().invoke(app, ["status"], catch_exceptions=False).stdout
        emulator.cloud.delete_node(f"projects/my-project/locations/{ZONE}/nodes/mine-0")
        api.close()


def remember_a_cluster(endpoint: str, rest: str) -> None:
    values = {"name": "mine", "project": "my-project", "zones": [ZONE], "accelerator_type": "v4-16", "head": "here"}
    config = ClusterConfig.from_dict({**values, "endpoint": endpoint, "secrets_endpoint": endpoint, "compute_endpoint": rest})
    folder = cluster_dir("mine")
    cluster = Cluster(config, HereHead.plan(config, Bundle(""), folder), Bundle(""), 0.0)
    (folder / "cluster.json").write_text(json.dumps(cluster.to_dict()))


def test_nothing_published_is_nothing_to_show(tmp_path: Path) -> None:
    with embedded_emulator() as emulator:
        api = TpuApi(emulator.endpoint, "my-project")
        api.create_node(ZONE, NodeRequest("mine-0", lookup("v4-8"), "tpu-ubuntu2204-base"))
        assert api.guest_attribute(ZONE, "mine-0", TROUBLE) == []
        api.close()
