"""TPU VMs that were made elsewhere: what is checked, how they join, and that nothing of ours deletes them. gcloud is a function here."""

import dataclasses
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from google.cloud import tpu_v2
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

from cluster import existing
from cluster.autoscaler import autoscaler_config, host_settings
from cluster.clusters import Cluster, check_fits
from cluster.config import ClusterConfig
from cluster.emulator.embedded import Embedded, embedded_emulator
from cluster.errors import ClusterError, ConfigError, PodlaunchError
from cluster.head_here import HereHead
from cluster.node_provider import SliceNodeProvider
from cluster.ray_nodes import RayNodes
from cluster.secret_place import SecretPlace
from cluster.tpu.errors import NotFoundError
from cluster.tpu.orphans import find_orphans
from cluster.tpu.provider import TPUProvider
from cluster.vm.bundle import Bundle
from cluster.vm.host_agent import read_settings
from cluster.vm.settings import SETTINGS_VARIABLE
from tests.inprocess import no_ray

ZONES = ["us-central2-b", "us-east5-b"]
CONFIG = ClusterConfig(name="mine", project="my-project", zones=ZONES, accelerator_type="v4-16", existing=["theirs"], max_slices=3)
PARENT = f"projects/my-project/locations/{ZONES[1]}"


@pytest.fixture
def emulator() -> Iterator[Embedded]:
    with embedded_emulator() as running:
        yield running


@pytest.fixture
def config(emulator: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterConfig:
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path / "state"))
    return dataclasses.replace(CONFIG, endpoint=emulator.endpoint)


@pytest.fixture
def provider(config: ClusterConfig) -> TPUProvider:
    return TPUProvider.connect(config)


def make(emulator: Embedded, name: str = "theirs", kind: str = "v4-16", **labels: str) -> None:
    node = tpu_v2.Node.pb()(accelerator_type=kind, runtime_version="tpu-ubuntu2204-base", labels=labels)
    emulator.cloud.create_node(PARENT, name, node)
    wait_until(lambda: emulator.cloud.get_node(f"{PARENT}/nodes/{name}").state == tpu_v2.Node.State.READY)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_cannot_join_is_told_before_anything_is_started(provider: TPUProvider, emulator: Embedded) -> None:
    with pytest.raises(ConfigError, match="there is no TPU VM 'theirs' in us-central2-b, us-east5-b of project my-project"):
        existing.check(provider)
    make(emulator, kind="v4-8")
    with pytest.raises(ConfigError, match=r"'theirs' is a v4-8 \(2x2x1\), the cluster is of v4-16 \(2x2x2\)"):
        existing.check(provider)


def test_a_slice_of_another_cluster_of_ours_is_refused(provider: TPUProvider, emulator: Embedded) -> None:
    make(emulator, **{"podlaunch-cluster": "other"})
    with pytest.raises(ConfigError, match="was made by podlaunch for 'other'"):
        existing.check(provider)


def test_one_that_is_not_ready_is_an_error_of_the_moment(provider: TPUProvider, emulator: Embedded) -> None:
    make(emulator)
    assert [item.zone for item in existing.check(provider)] == [ZONES[1]]
    emulator.cloud.set_node_state("theirs", "PREEMPTED")
    with pytest.raises(ClusterError, match="existing slice 'theirs' in us-east5-b is PREEMPTED"):
        existing.check(provider)


def test_ray_sees_an_instance_that_nothing_deletes(config: ClusterConfig, provider: TPUProvider, emulator: Embedded) -> None:
    make(emulator)
    settings = host_settings(config, "127.0.0.9:1", SecretPlace(file="/token"))
    written = yaml.safe_load(yaml.safe_dump(autoscaler_config(config, settings, Bundle("bundle-hash"), "0123456789ab")))
    types = written["available_node_types"]
    assert (types["v4-16"]["max_workers"], types["v4-16-existing"]["max_workers"], written["max_workers"]) == (2, 1, 3)
    ray = SliceNodeProvider(written["provider"], config.name, ray_nodes=RayNodes(no_ray))
    assert ray.non_terminated_nodes({}) == ["mine-head", "theirs"]
    tags = ray.node_tags("theirs")
    assert (tags[TAG_RAY_USER_NODE_TYPE], tags[TAG_RAY_NODE_KIND]) == ("v4-16-existing", "worker")
    assert ray.is_running("theirs")
    ray.terminate_nodes(["theirs"])
    with pytest.raises(NotFoundError, match="only you can make it"):
        ray.create_node({}, tags, 1)
    assert provider.stop() == 0
    assert find_orphans(provider.api, set(), "0123456789ab") == []
    emulator.cloud.preempt("theirs", notice=0)
    assert ray.non_terminated_nodes({}) == ["mine-head"], "Ray does not count on it any more"
    (shown,) = provider.get_status().slices
    assert (shown.existing, shown.state, shown.reason) == (True, "PREEMPTED", "it became PREEMPTED")
    assert [node.name for node in provider.api.list_nodes("-")] == ["theirs"], "and it is still the user's to delete"


class Gcloud:
    """Runs what it is given in a shell, as every host of the slice would."""

    def __init__(self, home: Path) -> None:
        self.home, self.calls = home, 0

    def __call__(self, words: Sequence[str]) -> None:
        self.calls += 1
        assert list(words[:6]) == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "theirs"]
        assert {"--project=my-project", f"--zone={ZONES[1]}", "--worker=all"} <= set(words)
        command = words[-1].removeprefix("--command=")
        env = {"HOME": str(self.home), "PATH": os.environ["PATH"]}
        subprocess.run(["bash", "-c", command], env=env, check=True, stdin=subprocess.DEVNULL, timeout=60)


def test_host_agent_is_started_once_and_ended_and_the_vm_is_left(provider: TPUProvider, emulator: Embedded, tmp_path: Path) -> None:
    make(emulator)
    before = emulator.cloud.get_node(f"{PARENT}/nodes/theirs")
    gcloud = Gcloud(tmp_path)
    settings = host_settings(CONFIG, "127.0.0.9:1", SecretPlace(file="/a token's file"))
    script = f"#!/bin/bash\necho \"${SETTINGS_VARIABLE}\" > '{tmp_path}/settings'\nexec sleep 1234.5\n"
    existing.attach(provider, settings, script, [], gcloud)
    wait_until(lambda: (tmp_path / "settings").exists() and (tmp_path / "settings").read_text().endswith("\n"))
    given = read_settings({SETTINGS_VARIABLE: (tmp_path / "settings").read_text()}, lambda _: "")
    assert given == dataclasses.replace(settings, node_type="v4-16-existing", owned=False)
    agent = psutil.Process(int((tmp_path / ".podlaunch" / "mine" / "pid").read_text()))
    wait_until(lambda: agent.cmdline() == ["sleep", "1234.5"])
    existing.attach(provider, settings, script, ["theirs"], gcloud)  # one host of two has joined
    assert (gcloud.calls, agent.is_running()) == (2, True), "asked again, and the agent that runs is kept"
    assert int((tmp_path / ".podlaunch" / "mine" / "pid").read_text()) == agent.pid
    existing.attach(provider, settings, script, ["theirs", "theirs"], gcloud)
    assert gcloud.calls == 2, "both have joined"
    existing.detach(provider, print, gcloud)
    wait_until(lambda: not agent.is_running() or agent.status() == psutil.STATUS_ZOMBIE)
    assert list((tmp_path / ".podlaunch").iterdir()) == []
    assert emulator.cloud.get_node(f"{PARENT}/nodes/theirs") == before


def test_gcloud_that_fails_is_told_with_the_command_for_the_hand(provider: TPUProvider, emulator: Embedded) -> None:
    make(emulator)

    def broken(words: Sequence[str]) -> None:
        raise ClusterError("Permission denied (publickey)")

    settings = host_settings(CONFIG, "127.0.0.9:1", SecretPlace(file="/token"))
    with pytest.raises(ClusterError, match=r"'theirs' in us-east5-b cannot be reached: Permission denied .*; by hand: gcloud compute tpus"):
        existing.attach(provider, settings, "", [], broken)
    told: list[str] = []
    existing.detach(provider, told.append, broken)
    assert len(told) == 1, "a stop goes on all the same"


def test_program_that_is_missing_or_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match="there is no gcloud-that-is-not-there on this machine"):
        existing.run_gcloud(["gcloud-that-is-not-there"])
    with pytest.raises(ClusterError, match=r"^the last word$"):
        existing.run_gcloud(["bash", "-c", "echo the first; echo the last word >&2; exit 3"])
    existing.run_gcloud(["true"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"existing": ["a", "b"], "max_slices": 1}, "existing names 2 slices"),
        ({"existing": ["a", "a"]}, "'a' is given twice"),
        ({"existing": ["projects/p/nodes/a"]}, "the name of a TPU VM, without its path"),
    ],
)
def test_wrong_names_are_told(values: dict[str, Any], words: str) -> None:
    with pytest.raises(PodlaunchError, match=words):
        ClusterConfig(name="mine", accelerator_type="v4-16", **values)
    assert ClusterConfig(name="mine", accelerator_type="v4-16", existing=["a", "b"]).effective_max_slices == 2
    assert json.loads(json.dumps(CONFIG.to_dict()))["existing"] == ["theirs"]


def test_running_cluster_without_the_slice_is_not_taken_for_one_that_has_it(config: ClusterConfig, tmp_path: Path) -> None:
    own = dataclasses.replace(config, existing=[], head="here")
    running = Cluster(own, HereHead.plan(own, Bundle(""), tmp_path), Bundle(""), 0.0)
    with pytest.raises(ClusterError, match=r"is up without the existing slices theirs; choose another cluster.name"):
        check_fits(running, config)
    check_fits(dataclasses.replace(running, config=config), dataclasses.replace(config, existing=[]))
