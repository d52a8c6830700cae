"""Several types of slices in one cluster: their configuration, and which runs a running cluster can serve."""

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.autoscaler import autoscaler_config, host_settings
from cluster.clusters import Cluster, check_fits
from cluster.config import ClusterConfig
from cluster.errors import ClusterError, ConfigError
from cluster.secret_place import SecretPlace
from cluster.vm.bundle import Bundle

VALUES: dict[str, Any] = {
    "name": "mine",
    "project": "my-project",
    "zones": ["us-central2-b"],
    "accelerator_type": "v4-16",
    "runtime_version": "my-image",
    "provisioning": "spot",
    "max_slices": 3,
    "node_types": {
        "eval": {"accelerator_type": "v6e-8", "provisioning": "on-demand", "zones": ["us-east5-b"], "slices": 2, "max_slices": 4}
    },
}


def config(**changes: Any) -> ClusterConfig:
    return ClusterConfig.from_dict({**VALUES, **changes})


def test_a_type_has_what_it_gives_and_else_what_the_cluster_has() -> None:
    more = config().of_type("eval")
    assert (more.kind, more.zones, more.slices, more.effective_max_slices, more.runtime_version) == ("v6e-8", ["us-east5-b"], 2, 4, None)
    assert (more.name, more.project, more.node_types) == ("mine", "my-project", {})
    same = config(node_types={"dear": {"provisioning": "on-demand"}}).of_type("dear")
    assert (same.kind, same.zones, same.runtime_version) == ("v4-16", ["us-central2-b"], "my-image")
    assert config().effective_zones == ["us-central2-b", "us-east5-b"], "where slices are looked for and deleted"
    assert config().of_type(None).effective_zones == ["us-central2-b"]
    assert ClusterConfig.from_dict(config().to_dict()) == config()


@pytest.mark.parametrize(
    ("types", "words"),
    [
        ({"eval": {"accelerator_type": "v6e-9"}}, r"^cluster.node_types.eval: .*v6e-9"),
        (
            {"eval": {"max_slices": 1, "slices": 2, "accelerator_type": "v6e-8"}},
            r"^cluster.node_types.eval: max_slices 1: must be",
        ),
        ({"eval": {"zones": ["us-central2-b"]}}, r"^cluster.node_types.eval: it is v4-16-spot like the cluster's own slices"),
        ({"a": {"accelerator_type": "v6e-8"}, "b": {"accelerator_type": "v6e-8"}}, r"^cluster.node_types.b: it is v6e-8-spot like a"),
        ({"eval": {"provisioning": "reserved"}}, r"^cluster.node_types.eval: reservation is missing"),
    ],
)
def test_a_wrong_type_is_named_in_one_line(types: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        config(node_types=types)
    assert len(str(caught.value).splitlines()) == 1


def test_a_type_that_the_cluster_lacks_is_told_with_those_it_has() -> None:
    with pytest.raises(ConfigError, match="node_types has no 'evil'; did you mean 'eval'"):
        config().of_type("evil")


def test_the_autoscaler_knows_every_type_by_a_resource_of_its_own() -> None:
    written = autoscaler_config(config(), host_settings(config(), "h:1", SecretPlace(file="/t")), Bundle("b"), "0123456789ab")
    types = written["available_node_types"]
    assert written["max_workers"] == 7
    assert {name: (kind["min_workers"], kind["max_workers"]) for name, kind in types.items()} == {
        "head": (0, 0), "v4-16-spot": (0, 3), "v6e-8": (0, 4),
    }  # fmt: skip
    assert types["v6e-8"]["resources"]["podlaunch-slice-v6e-8"] == 1
    assert "podlaunch-slice-v6e-8" not in types["v4-16-spot"]["resources"]


def test_a_running_cluster_serves_whoever_asks_for_one_of_its_types() -> None:
    running = cast(Cluster, SimpleNamespace(name="mine", config=config(), bundle=Bundle("b")))
    check_fits(running, config())
    check_fits(running, config().of_type("eval"))
    alone = config(node_types={}, accelerator_type="v6e-8", provisioning="on-demand", zones=["us-west1-c"])
    check_fits(running, alone)
    with pytest.raises(ClusterError, match="is up with slices of v4-16-spot, v6e-8, this asks for v5p-8-spot"):
        check_fits(running, config(node_types={}, accelerator_type="v5p-8"))
    with pytest.raises(ClusterError, match="at most 4 slices of v6e-8, this asks for 5"):
        check_fits(running, dataclasses.replace(alone, slices=5, max_slices=5))
