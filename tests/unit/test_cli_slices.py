"""`tpu start --dry-run`, `tpu start --bare`, `tpu status` and `tpu stop --orphans` against the emulated service in this process."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner, Result

from cluster import bare
from cluster.clusters import Cluster
from cluster.config import ClusterConfig
from cluster.emulator.embedded import Embedded, embedded_emulator
from cluster.errors import ClusterError, ConfigError
from cluster.head_here import HereHead
from cluster.state import cluster_dir
from cluster.tpu.api import QueuedRequest, TpuApi
from cluster.tpu.catalog import lookup
from cluster.tpu.messages import NodeRequest
from cluster.tpu.orphans import delete_orphan, find_orphans
from cluster.vm.bundle import Bundle
from launcher.app import launch
from launcher.cli.main import app
from launcher.cli.status import keep_showing
from launcher.compose import compose_config, load

ZONE = "us-central2-b"
SETTINGS = {"name": "mine", "project": "my-project", "zones": [ZONE], "accelerator_type": "v4-16", "slices": 2}


@pytest.fixture
def emulator() -> Iterator[Embedded]:
    with embedded_emulator() as running:
        yield running


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    return tmp_path / "state"


def config_file(tmp_path: Path, **more: Any) -> str:
    path = tmp_path / "tpu.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, **more}))
    return str(path)


def at(emulator: Embedded) -> dict[str, str]:
    return {"endpoint": emulator.endpoint, "secrets_endpoint": emulator.endpoint, "compute_endpoint": emulator.rest}


def tpu(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_dry_run_prints_requests_only_and_needs_no_cloud(tmp_path: Path) -> None:
    requests = json.loads(tpu("start", "--bare", "--dry-run", "--config", config_file(tmp_path)).stdout)
    assert [request["path"].rpartition("=")[2] for request in requests] == ["mine-0", "mine-1"]
    assert requests[0]["body"]["tpu"]["nodeSpec"][0]["node"]["acceleratorType"] == "v4-16"
    with_ray = json.loads(tpu("start", "--dry-run", "--config", config_file(tmp_path, queued_resource=False)).stdout)
    *head, slice_0, _ = with_ray
    assert slice_0["path"].startswith(f"/v2/projects/my-project/locations/{ZONE}/nodes?nodeId=mine-")
    assert "cluster.vm.host_agent" in slice_0["body"]["metadata"]["startup-script"]
    secret, version, vm = head
    assert secret["path"] == "/v1/projects/my-project/secrets?secretId=podlaunch-mine-token"
    assert version["body"] == {"payload": {"data": "<redacted>"}}
    assert (vm["path"], vm["body"]["name"]) == (f"/compute/v1/projects/my-project/zones/{ZONE}/instances", "podlaunch-mine-head")
    assert "accessConfigs" not in vm["body"]["networkInterfaces"][0], "no address on the internet unless it is asked for"


def test_bare_slices_are_shown_and_stopped_by_name(tmp_path: Path, emulator: Embedded) -> None:
    started = tpu("start", "--bare", "-y", "--config", config_file(tmp_path, **at(emulator)))
    assert "mine-1" in started.stdout
    (row,) = json.loads(tpu("status", "--json").stdout)
    assert (row["kind"], row["name"], [one["state"] for one in row["slices"]]) == ("bare", "mine", ["READY", "READY"])
    assert "slices without Ray mine" in tpu("status").stdout
    tpu("stop", "mine", "-y")
    assert json.loads(tpu("status", "--json").stdout) == []


def test_slices_of_a_forgotten_cluster_are_orphans_until_they_are_deleted(tmp_path: Path, emulator: Embedded, state: Path) -> None:
    tpu("start", "--bare", "-y", "--config", config_file(tmp_path, **at(emulator)))
    (state / "bare" / "mine.json").unlink()
    # Another cluster in the same project leads the commands there.
    tpu("start", "--bare", "-y", "--config", config_file(tmp_path, **at(emulator), name="other", slices=1))
    api = TpuApi(emulator.endpoint, "my-project")
    stranger = NodeRequest("far-0", lookup("v4-8"), "tpu-ubuntu2204-base", labels={"podlaunch-cluster": "far", "podlaunch-owner": "f" * 12})
    api.create_queued_resource(ZONE, QueuedRequest(stranger, 600.0))
    rows = json.loads(tpu("status", "--json").stdout)
    assert {one["name"]: one["ours"] for one in rows[-1]["slices"]} == {"mine-0": True, "mine-1": True, "far-0": False}
    assert "mine-0 (of mine)" in tpu("status").stdout
    with pytest.raises(ConfigError, match="say -y"):
        tpu("stop", "--orphans")
    assert "2 slices are being deleted" in tpu("stop", "--orphans", "-y").stdout
    living = [node.name for node in api.list_nodes(ZONE) if node.state != "DELETING"]
    assert sorted(living) == ["far-0", "other-0"]
    tpu("stop", "--orphans", "--any-owner", "-y")
    assert [node.name for node in api.list_nodes(ZONE) if node.state != "DELETING"] == ["other-0"]
    assert tpu("stop", "other", "-y")
    api.close()


def test_an_orphan_that_is_gone_meanwhile_is_no_error(emulator: Embedded) -> None:
    api = TpuApi(emulator.endpoint, "my-project")
    node = NodeRequest("mine-0", lookup("v4-8"), "tpu-ubuntu2204-base", labels={"podlaunch-cluster": "mine"})
    api.create_queued_resource(ZONE, QueuedRequest(node, 600.0))
    (orphan,) = find_orphans(api, {"other"}, "0123456789ab")
    assert not orphan.ours
    assert find_orphans(api, {"mine"}, "0123456789ab") == []
    assert delete_orphan(api, orphan)
    while api.list_queued_resources("-"):
        pass
    assert not delete_orphan(api, orphan)
    api.close()


def test_watch_shows_until_it_is_interrupted_and_does_not_mix_with_json() -> None:
    shown: list[str] = []

    def pause() -> None:
        if len(shown) == 6:
            raise KeyboardInterrupt

    keep_showing(lambda: shown.append("rows"), pause, lambda: shown.append("clear"))
    assert shown == ["clear", "rows"] * 3
    with pytest.raises(ConfigError, match="do not go together"):
        tpu("status", "--json", "--watch")


def test_quota_used_up_is_told_and_nothing_is_remembered(tmp_path: Path, emulator: Embedded) -> None:
    emulator.cloud.set_quota("us-central2", "v4", 0)
    with pytest.raises(Exception, match="quota used up"):
        tpu("start", "--bare", "-y", "--config", config_file(tmp_path, **at(emulator)))
    assert json.loads(tpu("status", "--json").stdout) == []


def test_waiting_slice_tells_for_how_long_and_an_orphan_its_topology(tmp_path: Path, emulator: Embedded) -> None:
    emulator.cloud.set_capacity(ZONE, "*", 0)
    config = ClusterConfig.from_dict({**SETTINGS, "endpoint": emulator.endpoint, "valid_until": "2h"})
    bare.remember(config)
    api = TpuApi(emulator.endpoint, "my-project")
    labels = {"podlaunch-cluster": "mine"}
    api.create_queued_resource(ZONE, QueuedRequest(NodeRequest("mine-0", lookup("v4-16"), "tpu-ubuntu2204-base", labels=labels), 7200.0))
    while (row := json.loads(tpu("status", "--json").stdout)[0])["slices"][0]["state"] != "WAITING_FOR_RESOURCES":
        pass
    assert row["slices"][0]["reason"] == "waits for capacity, at most 2.0 h more"
    bare.forget("mine")
    bare.remember(dataclasses.replace(config, name="other"))
    (orphan,) = json.loads(tpu("status", "--json").stdout)[-1]["slices"]
    assert (orphan["type"], orphan["hosts"], orphan["usd_per_hour"]) == ("v4-16 / 2x2x2", 2, 0.0)
    api.close()


def test_one_name_is_used_by_a_cluster_or_by_slices_without_ray(tmp_path: Path, emulator: Embedded) -> None:
    tpu("start", "--bare", "-y", "--config", config_file(tmp_path, endpoint=emulator.endpoint))
    for start in (
        lambda: tpu("start", "-y", "--config", config_file(tmp_path)),
        lambda: launch(load(compose_config(["cluster.name=mine", f"run.root={tmp_path}"])), Console()),
    ):
        with pytest.raises(ClusterError, match=r"slices without Ray called 'mine' are up; .* `tpu stop mine`"):
            start()
    tpu("stop", "mine", "-y")
    folder = cluster_dir("mine")
    config = ClusterConfig.from_dict({**SETTINGS, "endpoint": emulator.endpoint, "head": "here"})
    cluster = Cluster(config, HereHead.plan(config, Bundle(""), folder), Bundle(""), 0.0)
    (folder / "cluster.json").write_text(json.dumps(cluster.to_dict()))
    with pytest.raises(ClusterError, match="a cluster 'mine' is up; choose another name"):
        tpu("start", "--bare", "-y", "--config", config_file(tmp_path, endpoint=emulator.endpoint))
