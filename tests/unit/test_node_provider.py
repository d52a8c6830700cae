"""Ray's face of the slices, against the emulated Cloud TPU service in this process. Ray itself is not started."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from ray.autoscaler.tags import TAG_RAY_LAUNCH_REQUEST, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

from cluster.autoscaler import autoscaler_config, host_settings, node_type, slice_resource
from cluster.config import ClusterConfig
from cluster.emulator.embedded import Embedded, embedded_emulator
from cluster.emulator.faults import PRESETS
from cluster.node_names import slice_id
from cluster.node_provider import SliceNodeProvider
from cluster.ray_nodes import RayNodes
from cluster.secret_place import SecretPlace
from cluster.state import clusters_dir
from cluster.tpu.api import TpuApi
from cluster.tpu.errors import TPUError
from cluster.tpu.losses import read_losses
from cluster.tpu.provider import TPUProvider
from cluster.tpu.refusals import read_refusals
from cluster.vm.bundle import Bundle
from cluster.vm.metadata import HOST_ATTRIBUTE
from cluster.vm.settings import HostSettings
from tests.inprocess import at_once, no_ray

ZONE = "us-central2-b"
CONFIG = ClusterConfig(name="mine", cloud="emulated", accelerator_type="v4-16", max_slices=4)
TAGS = {TAG_RAY_USER_NODE_TYPE: "v4-16", TAG_RAY_NODE_KIND: "worker", TAG_RAY_LAUNCH_REQUEST: "request-1"}


@pytest.fixture
def emulator() -> Iterator[Embedded]:
    with embedded_emulator() as running:
        yield running


@pytest.fixture
def provider(emulator: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SliceNodeProvider:
    monkeypatch.setenv("PODLAUNCH_STATE_DIR", str(tmp_path))
    return make_provider(emulator)


def make_provider(emulator: Embedded, slices: TPUProvider | None = None) -> SliceNodeProvider:
    config = dataclasses.replace(CONFIG, endpoint=emulator.endpoint)
    settings = host_settings(config, "127.0.0.9:1", SecretPlace(secret="token-of-mine", project="p"))
    written = yaml.safe_load(yaml.safe_dump(autoscaler_config(config, settings, Bundle("bundle-hash"), "0123456789ab")))
    return SliceNodeProvider(written["provider"], config.name, slices, submit=at_once, ray_nodes=RayNodes(no_ray))


def test_one_autoscaler_instance_is_one_slice_of_several_hosts(provider: SliceNodeProvider) -> None:
    provider.create_node({}, TAGS, 2)
    nodes = provider.non_terminated_nodes({})
    assert nodes == ["mine-head", slice_id("mine", "request-1", 0), slice_id("mine", "request-1", 1)]
    deadline = time.monotonic() + 20
    while not all(provider.is_running(node) for node in nodes):  # the service's own thread makes them READY
        assert time.monotonic() < deadline
        provider.non_terminated_nodes({})
    assert provider.internal_ip(nodes[1]) != provider.internal_ip(nodes[2]) != ""
    tags = provider.node_tags(nodes[1])
    assert (tags[TAG_RAY_USER_NODE_TYPE], tags[TAG_RAY_LAUNCH_REQUEST], tags[TAG_RAY_NODE_KIND]) == ("v4-16", "request-1", "worker")
    assert provider.node_tags("mine-head")[TAG_RAY_NODE_KIND] == "head"


def test_a_request_that_ray_splits_into_batches_gets_all_of_its_slices(provider: SliceNodeProvider) -> None:
    for count in (5, 2):
        provider.create_node({}, TAGS, count)
    workers = provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"})
    assert sorted(workers) == [slice_id("mine", "request-1", index) for index in range(7)]
    assert all(provider.node_tags(node)[TAG_RAY_LAUNCH_REQUEST] == "request-1" for node in workers)


def test_a_refusal_that_comes_late_is_told_and_the_order_stands(provider: SliceNodeProvider, emulator: Embedded) -> None:
    provider._slices.config = dataclasses.replace(provider._slices.config, queued_resource=False)
    (clusters_dir() / "mine").mkdir()
    emulator.cloud.set_capacity("us-central2-b", "v4-16", 0)
    provider.create_node({}, TAGS, 1)  # accepted; that there is no capacity is the operation's end
    name = slice_id("mine", "request-1", 0)
    wait_until(lambda: provider.non_terminated_nodes({}) == ["mine-head", name] and provider._slices.policy.open("v4-16", [ZONE]) == [])
    wait_until(lambda: bool(read_refusals("mine")[1]) or provider.non_terminated_nodes({}) == [])
    assert read_refusals("mine")[1][0].startswith("stockout in us-central2-b, next try in")
    assert not provider.is_running(name)
    assert provider.node_tags(name)[TAG_RAY_USER_NODE_TYPE] == "v4-16"
    provider.terminate_node(name)
    wait_until(lambda: provider.non_terminated_nodes({}) == ["mine-head"])
    assert emulator.cloud.list_nodes("projects/podlaunch-emulated/locations/-")[0] == [], "what was left of it is deleted"


def test_a_waiting_slice_stands_and_a_preempted_one_is_deleted(provider: SliceNodeProvider, emulator: Embedded) -> None:
    (clusters_dir() / "mine").mkdir()
    emulator.cloud.set_capacity("us-central2-b", "v4-16", 1)
    provider.create_node({}, TAGS, 2)
    wait_until(lambda: sum(provider.is_running(node) for node in provider.non_terminated_nodes({})) == 2)
    running, waiting = sorted(provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"}), key=lambda node: not provider.is_running(node))
    assert not provider.is_running(waiting)
    assert (provider.internal_ip(waiting), provider.node_tags(waiting)[TAG_RAY_USER_NODE_TYPE]) == ("", "v4-16")
    emulator.cloud.set_capacity("us-central2-b", "v4-16", 0)
    node = emulator.cloud._nodes[f"projects/podlaunch-emulated/locations/us-central2-b/nodes/{running}"]
    node.message.state = 11  # PREEMPTED
    began = time.time()
    assert provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"}) == [waiting]
    listed, lost = read_losses("mine")
    assert lost == {running: "PREEMPTED"}, "whoever asks why its hosts are gone finds it"
    assert listed == pytest.approx(began, abs=5)
    wait_until(lambda: emulator.cloud.list_nodes("projects/podlaunch-emulated/locations/-")[0] == [])
    provider.terminate_node(waiting)
    wait_until(lambda: emulator.cloud.queued.list_page("projects/podlaunch-emulated/locations/-")[0] == [])


def wait_until(condition: Callable[[], bool]) -> None:
    """The emulated service works on threads of its own."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_new_provider_after_a_restart_knows_the_slices_and_their_tags(provider: SliceNodeProvider, emulator: Embedded) -> None:
    provider.create_node({}, TAGS, 1)
    (node,) = provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"})
    again = make_provider(emulator)
    assert again.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"}) == [node]
    assert again.node_tags(node) == provider.node_tags(node)


def test_a_terminated_slice_is_gone_from_the_listing_and_the_head_is_never_terminated(provider: SliceNodeProvider) -> None:
    provider.create_node({}, TAGS, 1)
    (node,) = provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"})
    provider.terminate_nodes([node, "mine-head"])
    assert provider.non_terminated_nodes({}) == ["mine-head"]
    assert provider.is_terminated(node)
    assert not provider.is_terminated("mine-head")


def test_a_listing_that_fails_raises_instead_of_being_short(emulator: Embedded, provider: SliceNodeProvider) -> None:
    provider.create_node({}, TAGS, 1)
    assert len(provider.non_terminated_nodes({})) == 2
    dead = make_provider(emulator, TPUProvider(CONFIG, TpuApi("127.0.0.1:1", "podlaunch-emulated", patience=0.1)))
    with pytest.raises(TPUError):
        dead.non_terminated_nodes({})


def test_nodes_carry_the_startup_script_and_name_the_token_without_holding_it(provider: SliceNodeProvider, emulator: Embedded) -> None:
    metadata = provider._types["v4-16"].metadata
    assert "bundle-hash" in metadata["startup-script"]
    settings = HostSettings.from_dict(json.loads(metadata[HOST_ATTRIBUTE]))
    assert (settings.head_address, settings.token.secret, settings.chips_per_host) == ("127.0.0.9:1", "token-of-mine", 4)
    assert (settings.owned, settings.endpoint, settings.head_lost_grace_s) == (True, emulator.endpoint, 1800.0)


@pytest.mark.parametrize(("provisioning", "seconds"), [("spot", 30.0), ("on-demand", 120.0)])
def test_a_spot_host_has_less_time_after_a_notice(provisioning: str, seconds: float) -> None:
    config = dataclasses.replace(CONFIG, provisioning=provisioning)
    assert host_settings(config, "h:1", SecretPlace(file="/t")).notice_s == seconds


def test_spot_and_on_demand_slices_of_one_type_are_told_apart() -> None:
    spot = dataclasses.replace(CONFIG, provisioning="spot")
    assert (node_type(CONFIG), node_type(spot)) == ("v4-16", "v4-16-spot")
    assert slice_resource(CONFIG) != slice_resource(spot)


def test_the_autoscalers_file_has_every_key_that_ray_dies_without() -> None:
    config = autoscaler_config(CONFIG, host_settings(CONFIG, "h:1", SecretPlace(file="/t")), Bundle("b"), "0123456789ab")
    legacy = {
        "cluster_name", "max_workers", "idle_timeout_minutes", "provider", "auth", "available_node_types", "head_node_type",
        "setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
        "initialization_commands", "file_mounts", "cluster_synced_files", "rsync_exclude", "rsync_filter", "docker", "upscaling_speed",
    }  # fmt: skip
    assert legacy <= config.keys()
    assert config["available_node_types"]["v4-16"]["max_workers"] == 4


def test_a_creation_that_no_zone_refused_but_failed_is_told_until_nobody_wants_it(provider: SliceNodeProvider, emulator: Embedded) -> None:
    (clusters_dir() / "mine").mkdir()
    emulator.cloud.faults.add(dataclasses.replace(PRESETS["permission"], method="Create*"))
    provider.create_node({}, TAGS, 1)
    (line,) = read_refusals("mine")[1]
    assert "permission denied" in line
    assert "grant roles/tpu.admin" in line
    (name,) = provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"})
    provider.terminate_node(name)
    assert provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"}) == []
    assert read_refusals("mine")[1] == []
