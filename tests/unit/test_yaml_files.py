"""YAML files of settings: what only looks like a key that is there twice."""

from pathlib import Path

from cluster.yaml_files import read_settings


def test_a_merged_key_may_be_given_again(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("a: &a {steps: 1}\nb: {inner: &b {<<: *a, steps: 2}}\nc: {<<: *b, steps: 3}\n")
    assert read_settings(file) == {"a": {"steps": 1}, "b": {"inner": {"steps": 2}}, "c": {"steps": 3}}
