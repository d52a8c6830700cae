"""TPUConfig and ClusterConfig."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from cluster.config import ClusterConfig, TPUConfig
from cluster.durations import parse_duration, short_duration
from cluster.errors import ConfigError
from cluster.tpu.catalog import all_types

LABELS = st.dictionaries(
    st.from_regex(r"[a-f][-_a-z0-9]{0,10}", fullmatch=True), st.from_regex(r"[-_a-z0-9]{0,10}", fullmatch=True), max_size=4
)
CONFIGS = st.builds(
    ClusterConfig,
    name=st.from_regex(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?", fullmatch=True),
    project=st.none() | st.from_regex(r"[a-z][-a-z0-9]{4,28}[a-z0-9]", fullmatch=True),
    zones=st.lists(st.sampled_from(["us-central2-b", "europe-west4-a", "northamerica-northeast1-c"]), max_size=3, unique=True),
    accelerator_type=st.sampled_from([kind.name for kind in all_types()]),
    slices=st.integers(1, 64),
    provisioning=st.sampled_from(["on-demand", "spot"]),
    labels=LABELS,
    queued_resource=st.booleans(),
    valid_until=st.from_regex(r"[1-9][0-9]{0,2}[hd]", fullmatch=True),
    data_disks=st.lists(st.from_regex(r"projects/p/regions/r/disks/[a-z]{1,5}:read-only", fullmatch=True), max_size=2),
    startup_commands=st.lists(st.sampled_from(["apt-get install -y jq", "echo 'a: b' # \u00fc\n\ttrue", "modprobe x"]), max_size=3),
    idle_minutes=st.none() | st.floats(0.1, 1e6),
    cloud=st.sampled_from(["google", "emulated"]),
    head=st.sampled_from([None, "here", "vm"]),
    head_access=st.sampled_from([None, "tunnel", "direct"]),
    head_zone=st.sampled_from([None, "us-east5-a"]),
    head_external_ip=st.booleans(),
    autostop=st.none() | st.from_regex(r"[1-9][0-9]{0,2}[hm]", fullmatch=True),
)


@given(CONFIGS)
def test_round_trip_through_yaml_gives_the_same_config(config: ClusterConfig) -> None:
    assert ClusterConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


@given(CONFIGS)
def test_round_trip_through_omegaconf_gives_the_same_config(config: ClusterConfig) -> None:
    assert OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClusterConfig), config.to_dict())) == config


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "Mine"}, "name 'Mine'"),
        ({"name": "a" * 43}, "at most 42"),
        ({"name": "ends-"}, "name 'ends-'"),
        ({"project": "P"}, "project 'P'"),
        ({"zones": ["us-central2"]}, "zones 'us-central2': a zone looks like us-central2-b"),
        ({"zones": ["us-east5-a", "us-east5-a"]}, "zones: 'us-east5-a' is given twice"),
        ({"accelerator_type": "v4-17"}, "nearest: v4-8, v4-16, v4-32"),
        ({"slices": 0}, "slices 0: must be at least 1"),
        ({"provisioning": "sport"}, "did you mean 'spot'?"),
        ({"provisioning": "reserved"}, "reservation is missing"),
        ({"reservation": "mine"}, "set provisioning=reserved too"),
        ({"labels": {"Team": "a"}}, "labels: key 'Team'"),
        ({"labels": {"team": "A B"}}, "labels.team 'A B'"),
        ({"labels": {"podlaunch-cluster": "x"}}, "are taken"),
        ({"tags": ["-x"]}, "tags '-x'"),
        ({"valid_until": "soon"}, "valid_until 'soon' is no length of time such as 90s, 30m, 4h"),
        ({"valid_until": "5s"}, "valid_until '5s': at least 60s"),
        ({"data_disks": ["scratch"]}, "data_disks 'scratch': a disk looks like"),
        (
            {"zones": ["us-east5-a"], "data_disks": ["projects/p/zones/us-east5-b/disks/d:read-only"]},
            "it is in us-east5-b only, so zones has to be that one zone",
        ),
        ({"data_disks": ["projects/p/zones/us-east5-b/disks/d"]}, "several hosts can share a disk only read-only"),
        ({"startup_commands": [" "]}, "startup_commands: one is empty"),
        ({"startup_commands": ["x" * 200_000]}, "at most 131072"),
        ({"service_account": "me"}, "service_account 'me'"),
        ({"endpoint": "https://tpu.googleapis.com"}, "without https://"),
        ({"zonse": []}, "did you mean 'zones'?"),
        ({"slices": "two"}, "slices: expected a whole number, got 'two'"),
    ],
)
def test_from_dict_wrong_value_names_the_field(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TPUConfig.from_dict({"name": "mine", "accelerator_type": "v4-16", **settings})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_from_dict_several_wrong_values_give_a_line_each() -> None:
    with pytest.raises(ConfigError) as caught:
        ClusterConfig.from_dict({"name": "Mine", "accelerator_type": "v4-17", "slices": 0, "min_slices": 3, "max_slices": 2})
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines] == ["cluster.name", "cluster.accelerator_type", "cluster.slices", "cluster.max_slices"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"head": "there"}, "did you mean 'here'?"),
        ({"head_access": "tunel"}, "did you mean 'tunnel'?"),
        ({"head_zone": "us-east5"}, "cluster.head_zone 'us-east5': a zone looks like"),
        ({"head_machine_type": "big"}, "cluster.head_machine_type 'big': a machine type looks like e2-standard-4"),
        ({"autostop": "two hours"}, "cluster.autostop 'two hours' is no length of time such as 90s"),
        ({"autostop": "1s"}, "cluster.autostop '1s': at least 5s"),
        ({"autostop": 7200}, "autostop: expected text, got 7200"),
    ],
)
def test_wrong_settings_of_the_head_are_one_line_each(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ClusterConfig.from_dict({"name": "mine", "accelerator_type": "v4-16", **settings})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_where_the_head_is_and_how_it_is_reached_follows_from_the_cloud() -> None:
    google = ClusterConfig("mine", accelerator_type="v4-8", zones=["us-east5-a", "us-east5-b"])
    emulated = ClusterConfig("mine", accelerator_type="v4-8", cloud="emulated")
    assert (google.effective_head, google.effective_head_access, google.effective_head_zone) == ("vm", "tunnel", "us-east5-a")
    assert (emulated.effective_head, emulated.effective_head_access, emulated.effective_head_zone) == ("here", "direct", "us-central2-b")
    assert [one.shares_files for one in (google, emulated)] == [False, True]
    assert not dataclasses.replace(emulated, head="vm").shares_files
    assert not dataclasses.replace(google, head="here").shares_files
    assert dataclasses.replace(google, autostop="1h30m").autostop_seconds == 5400.0


def test_from_yaml_reads_what_is_there_and_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "tpu.yaml"
    path.write_text("name: mine\ngeneration: v5p\ntopology: 2x2x2\n")
    assert TPUConfig.from_yaml(path).accelerator.name == "v5p-16"
    path.write_text("name: [")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        TPUConfig.from_yaml(path)
    with pytest.raises(ConfigError, match="cannot read"):
        TPUConfig.from_yaml(tmp_path / "none.yaml")


def test_with_environment_fills_only_what_is_not_given() -> None:
    env = {"GOOGLE_CLOUD_PROJECT": "from-env", "PODLAUNCH_ZONES": "us-east5-a, us-east5-b"}
    bare = TPUConfig("mine", accelerator_type="v4-8")
    filled = bare.with_environment(env)
    assert (filled.project, filled.zones) == ("from-env", ["us-east5-a", "us-east5-b"])
    given_ = dataclasses.replace(bare, project="my-project", zones=["us-central2-b"])
    assert given_.with_environment(env) == given_
    assert bare.with_environment({}) == bare


def test_missing_project_and_zones_name_the_variable_that_gives_them() -> None:
    config = ClusterConfig("mine", accelerator_type="v4-8")
    with pytest.raises(ConfigError, match="GOOGLE_CLOUD_PROJECT"):
        _ = config.effective_project
    with pytest.raises(ConfigError, match="PODLAUNCH_ZONES"):
        _ = config.effective_zones


def test_emulated_cluster_needs_neither_project_nor_zones() -> None:
    config = ClusterConfig("mine", accelerator_type="v4-16", cloud="emulated", slices=3)
    assert (config.effective_project, config.effective_zones) == ("podlaunch-emulated", ["us-central2-b"])
    assert config.with_environment({"GOOGLE_CLOUD_PROJECT": "from-env", "PODLAUNCH_ZONES": "us-east5-a"}) == config
    assert (config.chips, config.hosts, config.effective_max_slices) == (24, 6, 3)


@pytest.mark.parametrize(("provisioning", "usd"), [("on-demand", 2 * 8 * 3.22), ("spot", 2 * 8 * 0.92)])
def test_usd_per_hour_counts_all_slices_by_provisioning(provisioning: str, usd: float) -> None:
    config = TPUConfig("mine", accelerator_type="v4-16", slices=2, provisioning=provisioning)
    assert config.usd_per_hour == pytest.approx(usd)


def test_settings_of_an_earlier_version_still_make_a_config() -> None:
    config = TPUConfig.from_dict({"name": "mine", "accelerator_type": "v4-16", "provisioning": "spot", "labels": {"a": "b"}})
    assert (config.queued_resource, config.valid_until_seconds, config.disks) == (True, 4 * 3600.0, [])


def test_a_disk_of_one_host_may_be_written() -> None:
    config = TPUConfig("mine", accelerator_type="v4-8", zones=["us-east5-b"], data_disks=["projects/p/zones/us-east5-b/disks/d"])
    assert config.disks == [("projects/p/zones/us-east5-b/disks/d", False)]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90.0), ("30m", 1800.0), ("4h", 14400.0), ("1d", 86400.0), ("1h30m", 5400.0)])
def test_durations_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "4", "0h", "-4h", "4 hours", "30m1h", "1.5h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no length of time"):
        parse_duration(text)


@pytest.mark.parametrize(("seconds", "text"), [(-1.0, "0 s"), (39.6, "40 s"), (300.0, "5 min"), (9000.0, "2.5 h")])
def test_short_durations_are_said_in_one_unit(seconds: float, text: str) -> None:
    assert short_duration(seconds) == text


def test_the_grace_without_a_head_is_a_length_of_time() -> None:
    assert ClusterConfig(name="c", accelerator_type="v4-16", head_lost_grace="90s").head_lost_grace_seconds == 90.0
    with pytest.raises(ConfigError, match=r"cluster\.head_lost_grace 'soon'"):
        ClusterConfig(name="c", accelerator_type="v4-16", head_lost_grace="soon")
