"""The head on this machine: the head agent as a background process."""

import dataclasses
import hashlib
import json
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster import processes
from cluster.autoscaler import autoscaler_config, host_settings
from cluster.config import ClusterConfig
from cluster.heads import Progress
from cluster.node_names import head_instance_id
from cluster.ports import free_ports
from cluster.processes import ProcessRecord, spawn
from cluster.ray_env import ray_environment
from cluster.state import logs_dir, read_json, short_dir, write_atomic
from cluster.token import token_place
from cluster.tpu.owner import owner_id
from cluster.vm.bundle import Bundle
from cluster.vm.head_agent import HeadSettings


@dataclass(frozen=True)
class HereHead:
    """Its record names its marker before the process exists: whatever happens then, the next start or stop finds what was started."""

    config: ClusterConfig
    bundle: Bundle
    folder: Path
    settings: HeadSettings
    kind = "here"
    ready_limit_s = 120.0
    """A head needs 6 to 12 s on two idle cores; a busy machine may need several times that."""

    @classmethod
    def plan(cls, config: ClusterConfig, bundle: Bundle, folder: Path, companion: Sequence[str] = ()) -> "HereHead":
        return cls(config, bundle, folder, _settings(config, folder, companion))

    @classmethod
    def from_dict(cls, config: ClusterConfig, bundle: Bundle, folder: Path, values: dict[str, Any]) -> "HereHead":
        return cls(config, bundle, folder, HeadSettings(**values["settings"]))

    def again(self, config: ClusterConfig, companion: Sequence[str]) -> "HereHead":
        """The same head to be started again, where its hosts and runs know it."""
        settings = dataclasses.replace(self.settings, companion=list(companion))
        return dataclasses.replace(self, config=config, settings=settings)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "settings": vars(self.settings)}

    @property
    def marker(self) -> str:
        return f"head-{self.config.name}-{hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]}"

    @property
    def url(self) -> str:
        return self.settings.dashboard_url

    def show_url(self) -> str:
        return self.url

    @property
    def ray_address(self) -> str:
        return self.settings.address

    @property
    def log_hint(self) -> str:
        return f"see {logs_dir() / f'head-{self.config.name}.out'}"

    def start(self, progress: Progress) -> None:
        progress("starting the head of the Ray cluster")
        settings = host_settings(self.config, self.ray_address, token_place(self.config, self.folder))
        provider = autoscaler_config(self.config, settings, self.bundle, owner_id())
        write_atomic(Path(self.settings.autoscaler_file), yaml.safe_dump(provider))
        write_atomic(self.folder / "head.json", self.settings.to_json())
        process = spawn(
            [sys.executable, "-m", "cluster.vm.head_agent", str(self.folder / "head.json")],
            marker=self.marker,
            env={**ray_environment(self.settings.token_file), "PYTHONSAFEPATH": "1"},
            log=logs_dir() / f"head-{self.config.name}.out",
            cwd=self.folder,
        )
        write_atomic(self.folder / "process.json", json.dumps(vars(process)))

    def alive(self) -> bool:
        process = self._process()
        return process is not None and process.alive()

    def stop(self, progress: Progress) -> None:
        progress("stopping the head")
        process = self._process()
        if process is not None:
            processes.end(process)
        processes.kill_members(self.marker)
        shutil.rmtree(self.settings.temp_dir, ignore_errors=True)

    def let_go(self) -> None:
        """Nothing: it is reached without help."""

    def _process(self) -> ProcessRecord | None:
        found = read_json(self.folder / "process.json")
        return None if found is None else ProcessRecord.from_dict(found)


def _settings(config: ClusterConfig, folder: Path, companion: Sequence[str]) -> HeadSettings:
    # The hosts of a cloud must reach it; those of this machine need not, and what listens on loopback nobody else reaches.
    ip = _loopback_ip(folder) if config.shares_files else _own_ip()
    dashboard_ip = ip if config.shares_files else "127.0.0.1"  # hosts have no business there
    gcs, dashboard, client, metrics, dashboard_metrics = free_ports("", 5)  # Ray takes most of them on all interfaces
    return HeadSettings(
        cluster=config.name,
        instance_id=head_instance_id(config.name),
        ip=ip,
        dashboard_ip=dashboard_ip,
        gcs_port=gcs,
        dashboard_port=dashboard,
        client_port=client,
        metrics_port=metrics,
        dashboard_metrics_port=dashboard_metrics,
        token_file=str(folder / "token"),
        autoscaler_file=str(folder / "autoscaler.yaml"),
        temp_dir=str(short_dir(folder)),
        storage_endpoint=config.storage_endpoint,
        autostop_s=config.autostop_seconds,
        companion=list(companion),
    )


def _loopback_ip(folder: Path) -> str:
    """A loopback address of the cluster's own; 127.0.0.1 itself is rewritten by Ray to the machine's address."""
    return f"127.{16 + hashlib.sha256(str(folder).encode()).digest()[0] % 224}.0.1"


def _own_ip() -> str:
    """The address of this machine on its way out; connecting a datagram socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("8.8.8.8", 53))
        return str(probe.getsockname()[0])
