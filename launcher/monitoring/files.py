"""Writes a configuration of Prometheus that finds all that a cluster tells, and what Grafana reads: a data source and a dashboard.

DIR/prometheus.yml
DIR/grafana/dashboards/podlaunch.json
DIR/grafana/provisioning/dashboards/podlaunch.yaml  datasources/podlaunch.yaml
"""

import importlib.resources
from pathlib import Path
from typing import Any

import yaml

SCRAPE_S = 10
"""Ray's nodes take their processes' values every 10 s."""
PROMETHEUS_URL = "http://localhost:9090"
"""Where Grafana looks for Prometheus: the port that it takes where nobody says another."""
DISCOVERY = "/api/prometheus/sd"
"""Of Ray's dashboard: the metrics endpoints of all nodes, in the format of Prometheus's http_sd_configs."""


def write_monitoring(folder: Path, cluster: str, dashboard_url: str, token_file: Path) -> None:
    """`token_file`: of the cluster, by whose token the dashboard tells where the metrics are. Raises OSError."""
    folder = folder.absolute()
    grafana = folder / "grafana"
    _write(folder / "prometheus.yml", _yaml(prometheus_config(cluster, dashboard_url, token_file)))
    _write(grafana / "dashboards" / "podlaunch.json", dashboard())
    _write(grafana / "provisioning" / "datasources" / "podlaunch.yaml", _yaml(_datasource()))
    _write(grafana / "provisioning" / "dashboards" / "podlaunch.yaml", _yaml(_dashboards(grafana / "dashboards")))


def dashboard() -> str:
    """Grafana's, as JSON."""
    return (importlib.resources.files("launcher") / "monitoring" / "grafana.json").read_text(encoding="utf-8")


def prometheus_config(cluster: str, dashboard_url: str, token_file: Path) -> dict[str, Any]:
    """What prometheus.yml holds. The token stays in its file."""
    discovery = {
        "url": f"{dashboard_url}{DISCOVERY}",
        "refresh_interval": f"{SCRAPE_S}s",
        "authorization": {"type": "Bearer", "credentials_file": str(token_file)},
    }
    # One that is gone is no longer told of, so a node's series end soon after it.
    job = {"job_name": f"podlaunch-{cluster}", "http_sd_configs": [discovery]}
    return {"global": {"scrape_interval": f"{SCRAPE_S}s"}, "scrape_configs": [job]}


def _datasource() -> dict[str, Any]:
    how = {"access": "proxy", "url": PROMETHEUS_URL, "jsonData": {"timeInterval": f"{SCRAPE_S}s"}}
    source = {"name": "podlaunch", "type": "prometheus", **how}
    return {"apiVersion": 1, "datasources": [source]}


def _dashboards(folder: Path) -> dict[str, Any]:
    return {"apiVersion": 1, "providers": [{"name": "podlaunch", "type": "file", "options": {"path": str(folder)}}]}


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
