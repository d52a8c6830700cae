"""`tpu types`."""

import json

import pytest
from typer.testing import CliRunner

from cluster.errors import ConfigError
from cluster.tpu.catalog import all_types
from launcher.cli.main import app


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["types", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_json_is_the_whole_catalogue_and_nothing_else() -> None:
    rows = json.loads(call("--json"))
    assert [row["name"] for row in rows] == [kind.name for kind in all_types()]
    v4 = next(row for row in rows if row["name"] == "v4-16")
    assert (v4["topology"], v4["chips"], v4["hosts"], v4["usd_per_hour"], v4["usd_per_hour_spot"]) == ("2x2x2", 8, 2, 25.76, 7.36)
    assert next(row for row in rows if row["name"] == "v4-512")["topologies"][0] == "4x8x8"


def test_filters_by_generation_and_chips() -> None:
    assert {row["generation"] for row in json.loads(call("--json", "-g", "v5litepod"))} == {"v5e"}
    assert [row["name"] for row in json.loads(call("--json", "--chips", "8"))] == ["v4-16", "v5litepod-8", "v5p-16", "v6e-8"]
    sizes = {row["chips"] for row in json.loads(call("--json", "--min-chips", "16", "--max-chips", "64"))}
    assert sizes == {16, 32, 64}
    assert json.loads(call("--json", "--chips", "7")) == []


def test_table_names_types_and_says_when_there_is_none() -> None:
    table = call("-g", "v6e")
    assert "v6e-256" in table
    assert "v4-8" not in table
    assert "no accelerator type is like that" in call("--chips", "7")


def test_unknown_generation_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="known: v2, v3, v4, v5e, v5p, v6e"):
        CliRunner().invoke(app, ["types", "-g", "v9"], catch_exceptions=False)
