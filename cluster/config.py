"""Where a run runs: the configuration of slices (TPUConfig) and of the cluster made of them (ClusterConfig).

Everything here is checked when the object is made, before any cloud second. What the environment may add comes in through
`with_environment`, so that nothing here reads it by itself.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from cluster.durations import parse_duration
from cluster.errors import ConfigError
from cluster.schema import build, did_you_mean, to_plain
from cluster.tpu.catalog import AcceleratorType, resolve
from cluster.yaml_files import read_yaml

PROVISIONING = ("on-demand", "spot", "reserved")
CLOUDS = ("google", "emulated")
HEADS = ("vm", "here")
HEAD_ACCESS = ("tunnel", "direct")
EMULATED_PROJECT = "podlaunch-emulated"
EMULATED_ZONE = "us-central2-b"
PROJECT_VARIABLE = "GOOGLE_CLOUD_PROJECT"
ZONES_VARIABLE = "PODLAUNCH_ZONES"
BUCKET_VARIABLE = "PODLAUNCH_BUCKET"

# Google's rules for names of resources, projects, labels and network tags (https://cloud.google.com/compute/docs/naming-resources,
# https://cloud.google.com/compute/docs/labeling-resources); the cluster's name is shorter since node ids append to it.
_CLUSTER_NAME = re.compile(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?")
_PROJECT = re.compile(r"([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]")
_ZONE = re.compile(r"[a-z]+-[a-z]+[0-9]+-[a-z]")
_LABEL_KEY = re.compile(r"[a-z][-_a-z0-9]{0,62}")
_LABEL_VALUE = re.compile(r"[-_a-z0-9]{0,63}")
_TAG = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_EMAIL = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s]+")
_ENDPOINT = re.compile(r"[^\s:/]+:[0-9]{1,5}")
_URL = re.compile(r"https?://[^\s/]+")
_MACHINE_TYPE = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)+")
_BUCKET = re.compile(r"[a-z0-9][-_.a-z0-9]{1,61}[a-z0-9]")
_DISK = re.compile(r"projects/[^/]+/(zones|regions)/([^/]+)/disks/[^/:]+(:read-only)?")
_MAX_LABELS = 57
"""Google allows 64 a resource; the rest is for ours."""
_READ_ONLY = ":read-only"
_COMMANDS_BYTES = 128 * 1024
"""A metadata value may have 256 KiB, and the startup script holds more than these."""
_SHORTEST_WAIT_S = 60.0
_SHORTEST_AUTOSTOP_S = 5.0


_Check = tuple[str, str | None, re.Pattern[str], str]
"""A field's name, its value, what it has to match, and that in words."""


def _mismatches(at: str, checks: Iterable[_Check]) -> Iterator[str]:
    """One line for every value that is given and does not match."""
    for name, value, pattern, rule in checks:
        if value is not None and not pattern.fullmatch(value):
            yield f"{at}{name} {value!r}: {rule}"


@dataclass(frozen=True)
class TPUConfig:
    """Slices of Cloud TPU: which, how many, where, and how they are paid for.

    The kind of slice is given as `accelerator_type`, or as `generation` with `topology`.
    """

    name: str
    """Names the cluster; every resource carries it as a label and as the beginning of its name."""
    project: str | None = None
    """Google Cloud project; None: $GOOGLE_CLOUD_PROJECT."""
    zones: list[str] = field(default_factory=list)
    """Tried in this order when one has no capacity; empty: $PODLAUNCH_ZONES (comma-separated)."""
    accelerator_type: str | None = None
    """Such as v4-16 or v5litepod-8 (v5e-8 means the same)."""
    generation: str | None = None
    """v2, v3, v4, v5e, v5p or v6e; with `topology` instead of accelerator_type."""
    topology: str | None = None
    """Chips along each axis, such as 2x2x2."""
    runtime_version: str | None = None
    """The VM image; None: the one that the catalogue names for JAX."""
    slices: int = 1
    """How many slices one run uses."""
    provisioning: str = "on-demand"
    """on-demand, spot or reserved."""
    reservation: str | None = None
    """The reservation's name, for provisioning=reserved only."""
    queued_resource: bool = True
    """Ask for slices by queued resources, which wait for capacity and are how a reservation can be named; false: by plain nodes."""
    valid_until: str = "4h"
    """How long a queued resource may wait for capacity before it fails, such as 30m or 4h."""
    zone_patience: str = "10m"
    """How long a queued resource may wait for capacity in one of several zones before the next one is asked; the last one keeps waiting."""
    network: str | None = None
    subnetwork: str | None = None
    external_ips: bool = True
    service_account: str | None = None
    """E-mail of the account that the hosts and a head VM act as; None: the project's default. A head VM makes and deletes slices, reads the
    cluster's secrets, and with autostop deletes them and itself.
    """
    labels: dict[str, str] = field(default_factory=dict)
    """Your own labels on every resource."""
    tags: list[str] = field(default_factory=list)
    """Network tags of the hosts."""
    data_disks: list[str] = field(default_factory=list)
    """Disks that every host attaches: projects/P/zones/Z/disks/D, with :read-only behind it where several hosts share one."""
    startup_commands: list[str] = field(default_factory=list)
    """Shell commands that every host runs as root at boot, before anything of ours; one that fails keeps the host from joining."""
    endpoint: str | None = None
    """host:port of a plaintext gRPC Cloud TPU API; None: Google's own."""

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ConfigError("\n".join(problems))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From plain data. Raises ConfigError for an unknown key, a wrong type or a wrong value."""
        return build(cls, values)

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        """From a YAML file with the same keys as `from_dict`. Raises ConfigError, also when the file is missing or no YAML."""
        values = read_yaml(path)
        return cls.from_dict({} if values is None else values)

    def to_dict(self) -> dict[str, Any]:
        """The reverse of `from_dict`."""
        return to_plain(self)

    def with_environment(self, env: Mapping[str, str]) -> Self:
        """With `project` from GOOGLE_CLOUD_PROJECT and `zones` from PODLAUNCH_ZONES, each where none was given. Raises ConfigError."""
        zones = [zone.strip() for zone in env.get(ZONES_VARIABLE, "").split(",") if zone.strip()]
        return dataclasses.replace(
            self,
            project=self.project if self.project is not None else env.get(PROJECT_VARIABLE) or None,
            zones=self.zones or zones,
        )

    @property
    def accelerator(self) -> AcceleratorType:
        return resolve(self.accelerator_type, self.generation, self.topology)

    @property
    def chips_per_slice(self) -> int:
        return self.accelerator.chips

    @property
    def hosts_per_slice(self) -> int:
        return self.accelerator.hosts

    @property
    def effective_runtime_version(self) -> str:
        return self.runtime_version or self.accelerator.runtime_version

    @property
    def valid_until_seconds(self) -> float:
        return parse_duration(self.valid_until)

    @property
    def zone_patience_seconds(self) -> float:
        return parse_duration(self.zone_patience)

    @property
    def disks(self) -> list[tuple[str, bool]]:
        """Every data disk's source and whether it is read only."""
        return [(disk.removesuffix(_READ_ONLY), disk.endswith(_READ_ONLY)) for disk in self.data_disks]

    @property
    def usd_per_slice_hour(self) -> float | None:
        """Estimated list price of one slice in USD an hour; None when the catalogue has none. A reserved slice counts as on-demand."""
        kind = self.accelerator
        price = kind.usd_per_chip_hour_spot if self.provisioning == "spot" else kind.usd_per_chip_hour
        return None if price is None else price * kind.chips

    @property
    def usd_per_hour(self) -> float | None:
        """Estimated list price of all slices of one run in USD an hour; None when the catalogue has none."""
        price = self.usd_per_slice_hour
        return None if price is None else price * self.slices

    @property
    def adopted(self) -> list[str]:
        """Names of slices that were made elsewhere; only a cluster has any."""
        return []

    @property
    def effective_project(self) -> str:
        """The project to use. Raises ConfigError when none was given."""
        if self.project is None:
            raise ConfigError(f"{self._where}project is missing: give it, or set {PROJECT_VARIABLE}")
        return self.project

    @property
    def effective_zones(self) -> list[str]:
        """The zones to try, in order. Raises ConfigError when none was given."""
        if not self.zones:
            raise ConfigError(f"{self._where}zones is empty: give at least one (such as us-central2-b), or set {ZONES_VARIABLE}")
        return list(self.zones)

    _where = ""  # the path that error lines put before a field's name; not a field since it has no annotation

    def _problems(self) -> Iterator[str]:
        """One line for every wrong field."""
        at = self._where
        yield from self._wrong_names(at)
        try:
            resolve(self.accelerator_type, self.generation, self.topology)
        except ConfigError as error:
            yield f"{at}{error}"
        yield from (f"{at}zones: {zone!r} is given twice" for zone, count in Counter(self.zones).items() if count > 1)
        if self.slices < 1:
            yield f"{at}slices {self.slices}: must be at least 1"
        if self.provisioning not in PROVISIONING:
            yield f"{at}provisioning {self.provisioning!r} is unknown{did_you_mean(self.provisioning, PROVISIONING)}"
        elif (self.provisioning == "reserved") != (self.reservation is not None):
            given = "missing: provisioning=reserved needs its name" if self.reservation is None else "given: set provisioning=reserved too"
            yield f"{at}reservation is {given}"
        yield from self._wrong_wait(at)
        yield from self._wrong_labels(at)
        yield from self._wrong_disks(at)
        yield from self._wrong_commands(at)

    def _wrong_wait(self, at: str) -> Iterator[str]:
        for name, value in (("valid_until", self.valid_until), ("zone_patience", self.zone_patience)):
            try:
                seconds = parse_duration(value)
            except ValueError as error:
                yield f"{at}{name} {error}"
                continue
            if seconds < _SHORTEST_WAIT_S:
                yield f"{at}{name} {value!r}: at least {_SHORTEST_WAIT_S:.0f}s, a slice is not made faster"

    def _wrong_disks(self, at: str) -> Iterator[str]:
        for disk in self.data_disks:
            found = _DISK.fullmatch(disk)
            if found is None:
                yield f"{at}data_disks {disk!r}: a disk looks like projects/P/zones/Z/disks/D or the same with {_READ_ONLY} behind it"
            elif found[1] == "zones" and any(zone != found[2] for zone in self.zones):
                yield f"{at}data_disks {disk!r}: it is in {found[2]} only, so zones has to be that one zone"
            elif found[3] is None and self._shares_disks():
                yield f"{at}data_disks {disk!r}: several hosts can share a disk only read-only; write {_READ_ONLY} behind it"

    def _shares_disks(self) -> bool:
        """Whether more than one host attaches the disks; a type that does not exist is another line's business."""
        try:
            return self.slices * self.hosts_per_slice > 1
        except ConfigError:
            return False

    def _wrong_commands(self, at: str) -> Iterator[str]:
        if any(not command.strip() for command in self.startup_commands):
            yield f"{at}startup_commands: one is empty"
        size = sum(len(command.encode()) + 1 for command in self.startup_commands)
        if size > _COMMANDS_BYTES:
            yield f"{at}startup_commands: {size} bytes together, at most {_COMMANDS_BYTES}; put them in a file in a bucket and fetch it"

    def _wrong_names(self, at: str) -> Iterator[str]:
        checks: list[_Check] = [
            ("name", self.name, _CLUSTER_NAME, "lower-case letters, digits and '-', at most 42, beginning with a letter"),
            ("project", self.project, _PROJECT, "a project id of 6 to 30 lower-case letters, digits and '-'"),
            *(("zones", zone, _ZONE, "a zone looks like us-central2-b") for zone in self.zones),
            *(("tags", tag, _TAG, "lower-case letters, digits and '-', at most 63, beginning with a letter") for tag in self.tags),
            ("service_account", self.service_account, _EMAIL, "an e-mail address such as name@project.iam.gserviceaccount.com"),
            ("endpoint", self.endpoint, _ENDPOINT, "host:port, without https://"),
        ]
        yield from _mismatches(at, checks)

    def _wrong_labels(self, at: str) -> Iterator[str]:
        for key, value in self.labels.items():
            if not _LABEL_KEY.fullmatch(key):
                yield f"{at}labels: key {key!r}: lower-case letters, digits, '-' and '_', at most 63, beginning with a letter"
            elif key.startswith(("podlaunch-", "goog")):
                yield f"{at}labels: key {key!r}: names beginning with podlaunch- and goog are taken"
            if not _LABEL_VALUE.fullmatch(value):
                yield f"{at}labels.{key} {value!r}: lower-case letters, digits, '-' and '_', at most 63"
        if len(self.labels) > _MAX_LABELS:
            yield f"{at}labels: {len(self.labels)} given, at most {_MAX_LABELS}"


@dataclass(frozen=True)
class SliceType:
    """One more type of slice in a cluster. What is not given is as the cluster has it; an accelerator brings its own runtime version."""

    accelerator_type: str | None = None
    generation: str | None = None
    topology: str | None = None
    runtime_version: str | None = None
    provisioning: str | None = None
    reservation: str | None = None
    zones: list[str] = field(default_factory=list)
    slices: int = 1
    """How many slices a run of this type uses."""
    min_slices: int = 0
    max_slices: int | None = None
    slice_usd_per_hour: float | None = None


@dataclass(frozen=True)
class ClusterConfig(TPUConfig):
    """A Ray cluster of such slices, shared by the runs that name it."""

    cloud: str = "google"
    """google, or emulated: a Cloud TPU service on this machine."""
    min_slices: int = 0
    """Slices that are always there."""
    max_slices: int | None = None
    """Slices that may be there at once; None: as many as one run uses."""
    node_types: dict[str, SliceType] = field(default_factory=dict)
    """More types of slices beside the cluster's own, by the names that `run.slice_type` picks them with."""
    existing: list[str] = field(default_factory=list)
    """TPU VMs that you made elsewhere, by name, in one of the zones: they join the cluster, count among max_slices, are never deleted."""
    idle_minutes: float | None = None
    """An unused slice above min_slices is deleted after this; None: never."""
    boot_grace: str = "10m"
    """All hosts of a slice have to join within this after it became READY, else it is deleted and replaced; twice as long from 64 hosts on,
    three times from 256.
    """
    host_grace: str = "2m"
    """A slice of which a host is dead or hangs for so long is deleted and replaced."""
    churn_window: str = "30m"
    """A zone where slices live less than `churn_short` is asked less often, by the share of such slices within this time."""
    churn_short: str = "15m"
    churn_thresholds: list[float] = field(default_factory=lambda: [0.2, 0.5, 0.8])
    """From which shares on creation is slowed down to a half, to a tenth, and stopped for `churn_window`."""
    head_lost_grace: str = "30m"
    """A slice that cannot reach the cluster's head for so long deletes itself."""
    slice_usd_per_hour: float | None = None
    """What one slice costs an hour; None: the catalogue's estimate."""
    default_variant: str = "gemma3-1b"
    """The model that a run on this cluster trains unless it says otherwise."""
    bucket: str | None = None
    """The Cloud Storage bucket, without gs://, that holds what VMs install; None: $PODLAUNCH_BUCKET."""
    secrets_endpoint: str | None = None
    """host:port of a plaintext gRPC Secret Manager API; None: Google's own."""
    compute_endpoint: str | None = None
    """URL of a Compute Engine API over REST, such as http://127.0.0.1:8000; None: Google's own."""
    storage_endpoint: str | None = None
    """URL of a Cloud Storage API, such as http://127.0.0.1:8001; None: Google's own."""
    head: str | None = None
    """Where Ray's head runs: `vm`, a Compute Engine VM of its own, or `here`, this machine. None: vm on google, here on emulated."""
    head_machine_type: str = "e2-standard-4"
    """The head VM's machine type, always on-demand. Ray's head takes 1.2 GB, every run's supervisor 0.1 GB and more, and Ray kills
    processes when 95 % of the memory is taken: the 16 GB of an e2-standard-4 carry tens of runs, the 8 GB of an e2-standard-2 few.
    """
    head_zone: str | None = None
    """Where the head VM is; None: the first of `zones`."""
    head_external_ip: bool = False
    """Whether the head VM is given an address on the internet. Nothing of ours needs one where the network has Cloud NAT."""
    head_access: str | None = None
    """How commands reach a head VM: `tunnel`, by `gcloud compute ssh` through IAP, or `direct`, from within the VPC. None: tunnel on
    google, direct on emulated.
    """
    autostop: str | None = None
    """The cluster deletes itself, slices first, when no run was going on for so long, such as 2h; None: never."""

    _where = "cluster."

    def with_environment(self, env: Mapping[str, str]) -> Self:
        """As for TPUConfig. An emulated cluster takes nothing from it: it must be found again from a shell with other variables."""
        if self.cloud == "emulated":
            return self
        return dataclasses.replace(super().with_environment(env), bucket=self.bucket or env.get(BUCKET_VARIABLE) or None)

    @property
    def chips(self) -> int:
        """Chips of one run."""
        return self.slices * self.chips_per_slice

    @property
    def hosts(self) -> int:
        """Hosts of one run."""
        return self.slices * self.hosts_per_slice

    def of_type(self, name: str | None) -> "ClusterConfig":
        """The cluster as if the type of that name were its only one; None: its own type. Raises ConfigError."""
        if name is None:
            return dataclasses.replace(self, node_types={})
        if name not in self.node_types:
            known = did_you_mean(name, self.node_types) if self.node_types else "; the cluster has no node_types"
            raise ConfigError(f"{self._where}node_types has no {name!r}{known}")
        wanted = self.node_types[name]
        values: dict[str, Any] = {"existing": []}  # these are of the cluster's own type
        values |= {key: getattr(wanted, key) for key in ("slices", "min_slices", "max_slices", "slice_usd_per_hour")}
        if wanted.accelerator_type or wanted.generation or wanted.topology:
            values |= {key: getattr(wanted, key) for key in ("accelerator_type", "generation", "topology")}
            values["runtime_version"] = wanted.runtime_version
        elif wanted.runtime_version is not None:
            values["runtime_version"] = wanted.runtime_version
        if wanted.provisioning is not None or wanted.reservation is not None:
            values |= {"provisioning": wanted.provisioning or self.provisioning, "reservation": wanted.reservation}
        if wanted.zones:
            values["zones"] = wanted.zones
        return dataclasses.replace(self, node_types={}, **values)

    @property
    def types(self) -> list["ClusterConfig"]:
        """Every type of slice, the cluster's own first."""
        return [self.of_type(name) for name in (None, *self.node_types)]

    def type_like(self, accelerator_type: str) -> "ClusterConfig":
        """Its type of slices with that accelerator type; its own where it has none."""
        return next((kind for kind in self.types if kind.accelerator.name == accelerator_type), self.of_type(None))

    @property
    def kind(self) -> str:
        """The type of its own slices, for example `v4-16` or `v6e-8-spot`."""
        return self.accelerator.name + ("" if self.provisioning == "on-demand" else f"-{self.provisioning}")

    @property
    def boot_grace_seconds(self) -> float:
        return parse_duration(self.boot_grace)

    @property
    def host_grace_seconds(self) -> float:
        return parse_duration(self.host_grace)

    @property
    def churn_window_seconds(self) -> float:
        return parse_duration(self.churn_window)

    @property
    def churn_short_seconds(self) -> float:
        return parse_duration(self.churn_short)

    @property
    def head_lost_grace_seconds(self) -> float:
        return parse_duration(self.head_lost_grace)

    @property
    def usd_per_slice_hour(self) -> float | None:
        return self.slice_usd_per_hour if self.slice_usd_per_hour is not None else super().usd_per_slice_hour

    @property
    def effective_max_slices(self) -> int:
        return max(self.slices, len(self.existing)) if self.max_slices is None else self.max_slices

    @property
    def adopted(self) -> list[str]:
        return list(self.existing)

    @property
    def effective_project(self) -> str:
        return EMULATED_PROJECT if self.cloud == "emulated" and self.project is None else super().effective_project

    @property
    def effective_zones(self) -> list[str]:
        """Of all types: where there may be slices. Raises ConfigError when none was given."""
        own = [EMULATED_ZONE] if self.cloud == "emulated" and not self.zones else super().effective_zones
        return list(dict.fromkeys([*own, *(zone for more in self.node_types.values() for zone in more.zones)]))

    @property
    def effective_head(self) -> str:
        return self.head if self.head is not None else {"emulated": "here"}.get(self.cloud, "vm")

    @property
    def effective_head_access(self) -> str:
        return self.head_access if self.head_access is not None else {"emulated": "direct"}.get(self.cloud, "tunnel")

    @property
    def effective_head_zone(self) -> str:
        """Raises ConfigError when no zone was given."""
        return self.head_zone if self.head_zone is not None else self.effective_zones[0]

    @property
    def on_this_machine(self) -> bool:
        """Whether hosts, and a head VM, are processes of this machine and see its files."""
        return self.cloud == "emulated"

    @property
    def shares_files(self) -> bool:
        """Whether head and hosts may be told of files of this machine; where not, secrets travel through Secret Manager."""
        return self.effective_head == "here" and self.on_this_machine

    @property
    def autostop_seconds(self) -> float | None:
        return None if self.autostop is None else parse_duration(self.autostop)

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        at = self._where
        if self.cloud not in CLOUDS:
            yield f"{at}cloud {self.cloud!r} is unknown{did_you_mean(self.cloud, CLOUDS)}"
        if self.min_slices < 0:
            yield f"{at}min_slices {self.min_slices}: must be at least 0"
        yield from (f"{at}existing {name!r}: the name of a TPU VM, without its path" for name in self.existing if not _TAG.fullmatch(name))
        yield from (f"{at}existing: {name!r} is given twice" for name, count in Counter(self.existing).items() if count > 1)
        if self.effective_max_slices < len(self.existing):
            yield f"{at}max_slices {self.max_slices}: existing names {len(self.existing)} slices"
        if self.effective_max_slices < max(self.slices, self.min_slices):
            yield f"{at}max_slices {self.max_slices}: must be at least slices ({self.slices}) and min_slices ({self.min_slices})"
        yield from self._wrong_graces(at)
        yield from self._wrong_types(at)
        checks: list[_Check] = [
            ("bucket", self.bucket, _BUCKET, "a bucket's name without gs://: lower-case letters, digits, '-', '_' and '.'"),
            ("secrets_endpoint", self.secrets_endpoint, _ENDPOINT, "host:port, without https://"),
            ("compute_endpoint", self.compute_endpoint, _URL, "a URL such as http://host:port"),
            ("storage_endpoint", self.storage_endpoint, _URL, "a URL such as http://host:port"),
        ]
        yield from _mismatches(at, checks)
        if self.idle_minutes is not None and not self.idle_minutes > 0:
            yield f"{at}idle_minutes {self.idle_minutes}: must be above 0, or null for never"
        yield from self._wrong_head(at)

    def _wrong_head(self, at: str) -> Iterator[str]:
        if self.head is not None and self.head not in HEADS:
            yield f"{at}head {self.head!r} is unknown{did_you_mean(self.head, HEADS)}"
        if self.head_access is not None and self.head_access not in HEAD_ACCESS:
            yield f"{at}head_access {self.head_access!r} is unknown{did_you_mean(self.head_access, HEAD_ACCESS)}"
        if self.head_zone is not None and not _ZONE.fullmatch(self.head_zone):
            yield f"{at}head_zone {self.head_zone!r}: a zone looks like us-central2-b"
        if not _MACHINE_TYPE.fullmatch(self.head_machine_type):
            yield f"{at}head_machine_type {self.head_machine_type!r}: a machine type looks like e2-standard-4"
        try:
            seconds = self.autostop_seconds
        except ValueError as error:
            yield f"{at}autostop {error}, or null for never"
            return
        if seconds is not None and seconds < _SHORTEST_AUTOSTOP_S:
            yield f"{at}autostop {self.autostop!r}: at least {_SHORTEST_AUTOSTOP_S:.0f}s, a run is not submitted faster"

    def _wrong_graces(self, at: str) -> Iterator[str]:
        for name in ("boot_grace", "host_grace", "churn_window", "churn_short", "head_lost_grace"):
            try:
                parse_duration(getattr(self, name))
            except ValueError as error:
                yield f"{at}{name} {error}"
        shares = self.churn_thresholds
        if len(shares) != 3 or sorted(shares) != shares or not all(0 < share <= 1 for share in shares):
            yield f"{at}churn_thresholds {shares}: three shares above 0 and up to 1, in rising order"

    def _wrong_types(self, at: str) -> Iterator[str]:
        if not self.node_types:
            return
        kinds: dict[str, str] = {}
        for name in (None, *self.node_types):
            here = f"{at}node_types.{name}: "
            try:
                kind = self.of_type(name).kind
            except ConfigError as error:
                if name is not None:  # what is wrong with the cluster's own is told already
                    yield from (here + line.removeprefix(at) for line in str(error).splitlines())
                continue
            if kind in kinds:
                yield f"{here}it is {kind} like {kinds[kind]}, so that they cannot be told apart"
            kinds.setdefault(kind, name if name is not None else "the cluster's own slices")
