"""The configuration of Prometheus and Grafana that a cluster's user is given."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.gang.gauges import MEASUREMENTS
from launcher.monitoring.files import dashboard, write_monitoring

SECRET = "0123456789abcdef"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text(SECRET)
    write_monitoring(tmp_path / "out", "mine", "http://127.20.0.1:8265", tmp_path / "token")
    return tmp_path / "out"


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    return values


def test_prometheus_asks_the_dashboard_with_a_token_that_stays_in_its_file(folder: Path) -> None:
    (job,) = read(folder / "prometheus.yml")["scrape_configs"]
    (discovery,) = job["http_sd_configs"]
    assert discovery["url"] == "http://127.20.0.1:8265/api/prometheus/sd"
    assert Path(discovery["authorization"]["credentials_file"]).read_text() == SECRET
    assert not [path for path in folder.rglob("*") if path.is_file() and SECRET in path.read_text()]


def test_grafana_is_led_to_the_dashboard(folder: Path) -> None:
    (provider,) = read(folder / "grafana" / "provisioning" / "dashboards" / "podlaunch.yaml")["providers"]
    assert (Path(provider["options"]["path"]) / "podlaunch.json").read_text() == dashboard()
    (source,) = read(folder / "grafana" / "provisioning" / "datasources" / "podlaunch.yaml")["datasources"]
    assert source["type"] == "prometheus"


def test_the_dashboard_shows_every_measurement_and_names_none_that_does_not_exist() -> None:
    board = json.loads(dashboard())
    used = set(re.findall(r"ray_podlaunch_(\w+)", dashboard()))
    assert used == {one.name for one in MEASUREMENTS}
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert all(panel["description"] and panel["targets"] for panel in panels)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    tags = {one.name: {"run", "cluster", *one.tags} for one in MEASUREMENTS}
    for panel in panels:
        for target in panel["targets"]:
            known = {tag for name in re.findall(r"ray_podlaunch_(\w+)", target["expr"]) for tag in tags[name]} or {"ip"}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= known, target


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        write_monitoring(tmp_path / "file" / "below", "mine", "http://x", tmp_path / "token")
