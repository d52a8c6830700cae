"""The head as a Compute Engine VM: its specification, creation, look-up and end.

Its name follows from the cluster's, so that a creation whose answer was lost is found again; its metadata tells the head agent everything
but secrets, which it gets from Secret Manager with the rights of the VM's service account.
"""

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cloud_errors import AlreadyExistsError
from cluster.config import ClusterConfig
from cluster.errors import ClusterError, ConfigError
from cluster.heads import DASHBOARD_PORT, GCS_PORT, Progress
from cluster.node_names import head_vm_name
from cluster.services import Connect, Services, connect
from cluster.token import secret_name, token_place
from cluster.tpu.owner import owner_id
from cluster.tpu.requests import REDACTED, redacted, role_labels
from cluster.tpu.slices import HEAD_ROLE, OWNER_LABEL, ROLE_LABEL, SECRET_ROLE
from cluster.tunnel import Tunnel
from cluster.versions import maker
from cluster.vm.bootstrap import startup_script
from cluster.vm.bundle import Bundle
from cluster.vm.head_agent import VmHeadSettings
from cluster.vm.metadata import HEAD_ATTRIBUTE

if TYPE_CHECKING:
    from cluster.compute import Instance

STARTING = frozenset({"PROVISIONING", "STAGING", "RUNNING", "REPAIRING"})
"""States of an instance (Compute Engine's names) in which it serves or will soon by itself."""
BOOT_DISK_GB = 50
"""The image takes 10 GB, the environment of a head 5 GB; the rest is for logs of runs and Ray."""
IMAGE = "projects/ubuntu-os-cloud/global/images/family/ubuntu-2204-lts"
"""The TPU VM images are Ubuntu 22.04 too, so that head and hosts get the same Python."""
CREATE_LIMIT_S = 300.0
DELETE_LIMIT_S = 300.0
"""Compute Engine makes and deletes a VM within a minute as a rule."""
_SCOPE = "https://www.googleapis.com/auth/cloud-platform"


def head_spec(config: ClusterConfig, bundle: Bundle, folder: Path, owner: str, companion: Sequence[str] = ()) -> dict[str, Any]:
    """What Compute Engine is asked for, as its REST API has it."""
    zone = config.effective_head_zone
    settings = VmHeadSettings(config, bundle, owner, token_place(config, folder), list(companion))
    metadata = {
        "startup-script": startup_script(bundle.hash, bundle.location, agent="cluster.vm.head_agent"),
        HEAD_ATTRIBUTE: settings.to_json(),
    }
    labels = role_labels(config, owner, HEAD_ROLE)
    disk = {"sourceImage": IMAGE, "diskSizeGb": str(BOOT_DISK_GB), "diskType": f"zones/{zone}/diskTypes/pd-balanced", "labels": labels}
    return {
        "name": head_vm_name(config.name),
        "machineType": f"zones/{zone}/machineTypes/{config.head_machine_type}",
        "labels": labels,
        "metadata": {"items": [{"key": key, "value": value} for key, value in metadata.items()]},
        "disks": [{"boot": True, "autoDelete": True, "initializeParams": disk}],
        "networkInterfaces": [_interface(config, zone)],
        "serviceAccounts": [{"email": config.service_account or "default", "scopes": [_SCOPE]}],
        "tags": {"items": list(config.tags)},
        "scheduling": {"provisioningModel": "STANDARD", "onHostMaintenance": "MIGRATE", "automaticRestart": True},
    }


def head_requests(config: ClusterConfig, bundle: Bundle, folder: Path, owner: str, companion: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The requests that make the head and share its token, as REST would carry them, the token redacted. Sends nothing."""
    project, name = config.effective_project, secret_name(config.name)
    secret = {"replication": {"automatic": {}}, "labels": role_labels(config, owner, SECRET_ROLE)}
    token = [
        {"method": "POST", "path": f"/v1/projects/{project}/secrets?secretId={name}", "body": secret},
        {"method": "POST", "path": f"/v1/projects/{project}/secrets/{name}:addVersion", "body": {"payload": {"data": REDACTED}}},
    ]
    instances = f"/compute/v1/projects/{project}/zones/{config.effective_head_zone}/instances"
    spec = redacted(head_spec(config, bundle, folder, owner, companion))
    vm = [{"method": "POST", "path": instances, "body": spec}] if config.effective_head == "vm" else []
    return vm if config.shares_files else [*token, *vm]


def _interface(config: ClusterConfig, zone: str) -> dict[str, Any]:
    """Names are those of the TPU API, which takes short ones as well."""
    found: dict[str, Any] = {}
    network, subnetwork = config.network, config.subnetwork
    if subnetwork is not None:
        found["subnetwork"] = subnetwork if "/" in subnetwork else f"regions/{zone.rpartition('-')[0]}/subnetworks/{subnetwork}"
    if network is not None or subnetwork is None:
        network = network or "default"
        found["network"] = network if "/" in network else f"global/networks/{network}"
    if config.head_external_ip:
        found["accessConfigs"] = [{"type": "ONE_TO_ONE_NAT", "name": "External NAT"}]
    return found


def find_heads(services: Services, cluster: str | None = None) -> "list[Instance]":
    """The head VMs of the project, or of one of its clusters, whoever made them. Raises PodlaunchError."""
    wanted = {ROLE_LABEL: HEAD_ROLE, **({OWNER_LABEL: cluster} if cluster is not None else {})}
    return services.instances.list(wanted)


def read_settings(vm: "Instance") -> VmHeadSettings:
    """What its creator told the head agent. Raises ClusterError when that makes no sense to this version."""
    text = vm.metadata.get(HEAD_ATTRIBUTE, "{}")
    try:
        return VmHeadSettings.from_json(text)
    except (ValueError, ConfigError) as error:
        by = "another version of podlaunch" if isinstance(error, json.JSONDecodeError) else maker(json.loads(text))
        words = f"the head VM {vm.name} in {vm.zone} was made by {by} ({error})"
        raise ClusterError(f"{words}; use that version, or delete the VM") from error


@dataclass(frozen=True)
class VmHead:
    config: ClusterConfig
    bundle: Bundle
    folder: Path
    """The cluster's folder on this machine."""
    zone: str
    connect: Connect = field(default=connect, compare=False, repr=False)
    companion: tuple[str, ...] = field(default=(), compare=False)
    """What runs beside Ray on a head that is to be made; one that is found again has it already."""
    clock: Callable[[], float] = field(default=time.monotonic, compare=False, repr=False)
    sleep: Callable[[float], None] = field(default=time.sleep, compare=False, repr=False)
    kind = "vm"
    ready_limit_s = 900.0
    """A VM boots in half a minute and then installs what a head needs, a few hundred MB."""

    @classmethod
    def plan(
        cls, config: ClusterConfig, bundle: Bundle, folder: Path, connect: Connect = connect, companion: Sequence[str] = ()
    ) -> "VmHead":
        return cls(config, bundle, folder, config.effective_head_zone, connect, tuple(companion))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "instance": self.name, "zone": self.zone}

    @property
    def name(self) -> str:
        return head_vm_name(self.config.name)

    @property
    def ray_address(self) -> str:
        return f"{self._ip}:{GCS_PORT}"

    @property
    def url(self) -> str:
        if self.config.effective_head_access == "direct":
            return f"http://{self._ip}:{DASHBOARD_PORT}"
        return f"http://127.0.0.1:{self._tunnel.open()}"

    def show_url(self) -> str:
        return self.url if self.config.effective_head_access == "direct" else f"through `tpu dashboard {self.config.name}`"

    @property
    def log_hint(self) -> str:
        where = f"--zone {self.zone} --project {self.config.effective_project}"
        return f"see its boot: gcloud compute instances get-serial-port-output {self.name} {where}"

    def start(self, progress: Progress) -> None:
        """Raises ClusterError when the name is taken by a VM that this cluster did not make, PodlaunchError when it is refused."""
        progress(f"creating the head VM {self.name} in {self.zone} ({self.config.head_machine_type})")
        instances = self._services.instances
        try:
            operation = instances.insert(self.zone, head_spec(self.config, self.bundle, self.folder, owner_id(), self.companion))
        except AlreadyExistsError:
            self._check_ours(instances.get(self.zone, self.name))
            return
        instances.wait_operation(self.zone, operation, CREATE_LIMIT_S)

    def alive(self) -> bool:
        found = self._services.instances.get(self.zone, self.name)
        return found is not None and found.status in STARTING

    def let_go(self) -> None:
        self._tunnel.close()

    def stop(self, progress: Progress) -> None:
        self.let_go()
        instances = self._services.instances
        found = instances.get(self.zone, self.name)
        if found is not None and self._is_ours(found):
            progress(f"deleting the head VM {self.name}")
            instances.delete(self.zone, self.name)
            self._wait_until_gone()

    def _wait_until_gone(self) -> None:
        deadline = self.clock() + DELETE_LIMIT_S
        while (found := self._services.instances.get(self.zone, self.name)) is not None:
            if self.clock() > deadline:
                raise ClusterError(
                    f"the head VM {self.name} in {self.zone} is still {found.status} after {DELETE_LIMIT_S:.0f} s; try again"
                )
            self.sleep(0.5)

    def _check_ours(self, found: "Instance | None") -> None:
        if found is not None and not self._is_ours(found):
            words = f"a VM {self.name} exists in {self.zone} that cluster {self.config.name!r} did not make"
            raise ClusterError(f"{words}; choose another cluster.name, or delete the VM")

    def _is_ours(self, found: "Instance") -> bool:
        return found.labels.get(OWNER_LABEL) == self.config.name and found.labels.get(ROLE_LABEL) == HEAD_ROLE

    @functools.cached_property
    def _services(self) -> Services:
        return self.connect(self.config)

    @functools.cached_property
    def _ip(self) -> str:
        found = self._services.instances.get(self.zone, self.name)
        if found is None:
            raise ClusterError(f"the head VM {self.name} in {self.zone} is gone; make it again with: tpu start {self.config.name}")
        return found.ip

    @property
    def _tunnel(self) -> Tunnel:
        return Tunnel(self.folder, self.name, self.zone, self.config.effective_project, DASHBOARD_PORT)
