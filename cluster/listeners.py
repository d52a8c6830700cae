"""Every port that a cluster opens: who listens, where, and who is let in. docs/ports-and-firewall.md is made of this table:

    python -m cluster.listeners > docs/ports-and-firewall.md

A test compares it with what really listens on an emulated cluster while a run trains.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cluster.config import ClusterConfig
from cluster.heads import DASHBOARD_PORT, GCS_PORT


class Scope(StrEnum):
    """How far a port can be reached where no firewall stands in between, from the narrowest."""

    LOOPBACK = "loopback"
    """This machine alone."""
    OWN = "own address"
    """The one address by which the cluster knows the machine."""
    ALL = "all interfaces"


class Auth(StrEnum):
    """Who is let in."""

    TOKEN = "token"
    """Who shows the cluster's token."""
    USER = "same user"
    """Processes of the user who started it, by the kernel's table of connections."""
    NONE = "nobody is asked"


@dataclass(frozen=True)
class Owner:
    """A kind of process that listens."""

    name: str
    runs_on: str
    command: str
    """A regular expression that finds it by its command line, as `ps` shows it."""


_SCRIPT = r"^\S+ (-\w+ )*\S*"
"""Python, its options, and the beginning of the script's path: a raylet's arguments hold the command lines of its agents."""

GCS = Owner("Ray's head (GCS)", "head", r"^\S*/gcs_server ")
DASHBOARD = Owner("Ray's dashboard and job server", "head", rf"{_SCRIPT}/ray/dashboard/dashboard\.py ")
MONITOR = Owner("Ray's autoscaler", "head", rf"{_SCRIPT}/autoscaler/v2/monitor\.py ")
CLIENT_SERVER = Owner("Ray's client server", "head", r"-m ray\.util\.client\.server .*--mode=proxy")
CLIENT_SESSION = Owner("a session of Ray's client server", "head", r"ray\.util\.client\.server .*--mode=specific-server")
AGENT = Owner("Ray's dashboard agent", "head, hosts", rf"^ray::DashboardAgent|{_SCRIPT}/ray/dashboard/agent\.py ")
ENV_AGENT = Owner("Ray's runtime environment agent", "head, hosts", rf"^ray::RuntimeEnvAgent|{_SCRIPT}/runtime_env/agent/main\.py ")
RAYLET = Owner("raylet", "head, hosts", r"^\S*/raylet/raylet ")
WORKER = Owner("Ray's workers", "head, hosts", rf"^ray::(?!DashboardAgent|RuntimeEnvAgent)|{_SCRIPT}/workers/default_worker\.py ")
SUPERVISOR = Owner("supervisor of a run", "head", r"-m launcher\.gang\.supervisor ")
TRAINING = Owner("training process", "hosts", r"-m launcher\.training\.(child |warm$)")
TUNNEL = Owner("tunnel to a head VM", "your machine", r"compute ssh .*--tunnel-through-iap")
EMULATOR = Owner("emulated cloud", "your machine", r"-m cluster\.emulator ")
STORAGE = Owner("emulated object storage", "your machine", r"fake-gcs-server")


@dataclass(frozen=True)
class Listener:
    """One kind of port."""

    name: str
    owner: Owner
    scope: Scope
    """The widest that it may listen."""
    protocol: str
    auth: Auth
    port: str
    """A number where it is fixed, else who chooses it."""
    why: str
    serves: tuple[str, ...] = ()
    """The gRPC services behind it."""


_FREE = "free, chosen at start"
_BINDS_ALL = "Ray binds all interfaces whatever the node's address is, and has no setting for it."
_ENDS = (
    "Ray 2.60.0 looks at the token of RaySyncer.StartSync only after the header node_id: a call without it learns nothing and ends the "
    "process, which its agent starts again. Only the firewall keeps such a call out."
)
_EXPORTER = f"Read-only counters for Prometheus; Ray asks nobody. {_BINDS_ALL}"
_GCS_SERVICES = (
    "ray.rpc.ActorInfoGcsService",
    "ray.rpc.ControlPlanePubSubGcsService",
    "ray.rpc.InternalKVGcsService",
    "ray.rpc.JobInfoGcsService",
    "ray.rpc.NodeInfoGcsService",
    "ray.rpc.NodeResourceInfoGcsService",
    "ray.rpc.ObservabilityPubSubService",
    "ray.rpc.PlacementGroupInfoGcsService",
    "ray.rpc.RayEventExportGcsService",
    "ray.rpc.RuntimeEnvGcsService",
    "ray.rpc.TaskInfoGcsService",
    "ray.rpc.WorkerInfoGcsService",
    "ray.rpc.autoscaler.AutoscalerStateService",
    "ray.rpc.syncer.RaySyncer",
)
_CLIENT_SERVICES = ("ray.rpc.RayletDataStreamer", "ray.rpc.RayletDriver", "ray.rpc.RayletLogStreamer")
_AGENT_SERVICES = (
    "opentelemetry.proto.collector.metrics.v1.MetricsService",
    "ray.rpc.LogService",
    "ray.rpc.ReporterService",
    "ray.rpc.events.EventAggregatorService",
)
_WORKER_SERVICES = ("ray.rpc.CoreWorkerService",)

LISTENERS: tuple[Listener, ...] = (
    Listener(
        "GCS",
        GCS,
        Scope.ALL,
        "gRPC",
        Auth.TOKEN,
        f"{GCS_PORT} on a head VM, free on this machine",
        f"Hosts join here. {_BINDS_ALL} {_ENDS}",
        _GCS_SERVICES,
    ),
    Listener(
        "dashboard",
        DASHBOARD,
        Scope.OWN,
        "HTTP",
        Auth.TOKEN,
        f"{DASHBOARD_PORT} on a head VM, free on this machine",
        "Jobs are submitted here. 127.0.0.1 of a head VM behind a tunnel; its address in the VPC with cluster.head_access=direct, of which "
        "`tpu status` warns. The page without data, its pictures and health checks are public.",
    ),
    Listener("dashboard metrics", DASHBOARD, Scope.ALL, "HTTP", Auth.NONE, _FREE, _EXPORTER),
    Listener("autoscaler metrics", MONITOR, Scope.ALL, "HTTP", Auth.NONE, _FREE, _EXPORTER),
    Listener(
        "client server",
        CLIENT_SERVER,
        Scope.OWN,
        "gRPC",
        Auth.TOKEN,
        _FREE,
        "ray.init('ray://...'), which nothing of ours uses; Ray cannot leave it out. On 127.0.0.1 besides.",
        _CLIENT_SERVICES,
    ),
    Listener(
        "client session",
        CLIENT_SESSION,
        Scope.LOOPBACK,
        "gRPC",
        Auth.TOKEN,
        "23000 to 23999",
        "One for each ray.init('ray://...').",
        _CLIENT_SERVICES,
    ),
    Listener(
        "driver of a client session",
        CLIENT_SESSION,
        Scope.ALL,
        "gRPC",
        Auth.TOKEN,
        _FREE,
        f"The session is a driver of Ray. {_BINDS_ALL}",
        _WORKER_SERVICES,
    ),
    Listener(
        "agent HTTP",
        AGENT,
        Scope.OWN,
        "HTTP",
        Auth.TOKEN,
        _FREE,
        "The dashboard asks it for logs and jobs. On 127.0.0.1 besides. Health checks are public.",
    ),
    Listener(
        "agent gRPC",
        AGENT,
        Scope.ALL,
        "gRPC",
        Auth.TOKEN,
        _FREE,
        f"Takes the counters of the node's processes. {_BINDS_ALL}",
        _AGENT_SERVICES,
    ),
    Listener("agent metrics", AGENT, Scope.ALL, "HTTP", Auth.NONE, _FREE, _EXPORTER),
    Listener(
        "agent worker",
        AGENT,
        Scope.ALL,
        "gRPC",
        Auth.TOKEN,
        _FREE,
        f"On the head, once a job was submitted: the agent is a driver of Ray then. {_BINDS_ALL}",
        _WORKER_SERVICES,
    ),
    Listener(
        "runtime environment agent", ENV_AGENT, Scope.OWN, "HTTP", Auth.TOKEN, _FREE, "The raylet asks it for environments of workers."
    ),
    Listener(
        "node manager",
        RAYLET,
        Scope.ALL,
        "gRPC",
        Auth.TOKEN,
        _FREE,
        f"Leases workers. {_BINDS_ALL} {_ENDS}",
        ("ray.rpc.NodeManagerService", "ray.rpc.syncer.RaySyncer"),
    ),
    Listener(
        "object manager",
        RAYLET,
        Scope.ALL,
        "gRPC",
        Auth.TOKEN,
        _FREE,
        f"Moves objects between nodes. {_BINDS_ALL}",
        ("ray.rpc.ObjectManagerService",),
    ),
    Listener("worker", WORKER, Scope.ALL, "gRPC", Auth.TOKEN, _FREE, f"Actor calls. {_BINDS_ALL}", _WORKER_SERVICES),
    Listener("driver", SUPERVISOR, Scope.ALL, "gRPC", Auth.TOKEN, _FREE, f"The same of a run's supervisor. {_BINDS_ALL}", _WORKER_SERVICES),
    Listener(
        "JAX coordinator",
        TRAINING,
        Scope.OWN,
        "gRPC",
        Auth.NONE,
        _FREE,
        "Process 0 of a run of several hosts. JAX has no authentication: the firewall has to keep others out.",
    ),
    Listener(
        "gloo",
        TRAINING,
        Scope.OWN,
        "TCP",
        Auth.NONE,
        _FREE,
        "Collectives between hosts on CPU devices only, so never on a TPU slice. JAX binds the address that the machine's name resolves to "
        "and lets nobody choose.",
    ),
    Listener(
        "MEGASCALE coordinator",
        TRAINING,
        Scope.ALL,
        "gRPC",
        Auth.NONE,
        _FREE,
        "Process 0 of a run of several slices, and libtpu's transport between them: closed source, without authentication as far as known, "
        "not seen by our tests, which have no TPU.",
    ),
    Listener(
        "TPU runtime",
        TRAINING,
        Scope.ALL,
        "gRPC",
        Auth.NONE,
        "of libtpu's choice",
        "libtpu between the hosts of one slice: closed source like the line above, and not seen by our tests either.",
    ),
    Listener(
        "tunnel",
        TUNNEL,
        Scope.LOOPBACK,
        "HTTP",
        Auth.TOKEN,
        _FREE,
        "Leads to the dashboard of a head VM, which asks for the token.",
    ),
    Listener(
        "emulated Cloud TPU API and Secret Manager", EMULATOR, Scope.LOOPBACK, "gRPC", Auth.USER, _FREE, "The same port after a restart."
    ),
    Listener(
        "emulated REST APIs",
        EMULATOR,
        Scope.LOOPBACK,
        "HTTP",
        Auth.USER,
        _FREE,
        "Cloud TPU, Secret Manager, Compute Engine. Web pages of the user's own browser are refused.",
    ),
    Listener(
        "emulator's admin endpoint", EMULATOR, Scope.LOOPBACK, "HTTP", Auth.USER, _FREE, "Faults and the like; `tpu emulator` asks it."
    ),
    Listener(
        "metadata server of an emulated host",
        EMULATOR,
        Scope.LOOPBACK,
        "HTTP",
        Auth.NONE,
        _FREE,
        "One a host, at its address, as on every VM; it names secrets and holds none.",
    ),
    Listener(
        "emulated Cloud Storage",
        STORAGE,
        Scope.LOOPBACK,
        "HTTP",
        Auth.NONE,
        _FREE,
        "Only where the extra `gcs` is installed. Other users of the machine can read and write it.",
    ),
)


def owner_of(command_line: str) -> Owner | None:
    """Whose process that is; None for one that should not listen at all."""
    owners = dict.fromkeys(row.owner for row in LISTENERS)
    return next((owner for owner in owners if re.search(owner.command, command_line)), None)


def rows_of(owner: Owner) -> list[Listener]:
    return [row for row in LISTENERS if row.owner is owner]


def wider_than_needed(config: ClusterConfig) -> Iterator[str]:
    """One line for each choice in the configuration that lets others reach what they otherwise could not, with the way back."""
    if config.on_this_machine or config.effective_head != "vm":
        return
    if config.effective_head_access == "direct":
        yield (
            f"the dashboard listens in the VPC at port {DASHBOARD_PORT} and not on the head's loopback alone (cluster.head_access=direct): "
            "whoever reaches it needs only the token, which travels unencrypted; head_access=tunnel closes it"
        )
    if config.head_external_ip:
        yield (
            "the head has an address on the internet (cluster.head_external_ip=true): only the network's firewall keeps others from its "
            "ports, see docs/ports-and-firewall.md"
        )


def document() -> str:
    """docs/ports-and-firewall.md."""
    used = "\n".join(_section(title, [row for row in LISTENERS if row.owner.runs_on == title]) for title in _PLACES)
    return f"{_BEGIN}{used}\n{_END}"


_PLACES = tuple(dict.fromkeys(row.owner.runs_on for row in LISTENERS))
_HEADINGS = {
    "head": "On the head",
    "head, hosts": "On the head and on every host",
    "hosts": "On every host while a run trains",
    "your machine": "On your machine",
}


def _section(place: str, rows: Sequence[Listener]) -> str:
    lines = [
        f"## {_HEADINGS[place]}",
        "",
        "| port of | process | interface | protocol | who is let in | port | |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | {row.owner.name} | {row.scope} | {row.protocol} | {_shown(row.auth)} | {row.port} | {row.why} |" for row in rows
    ]
    return "\n".join([*lines, ""])


def _shown(auth: Auth) -> str:
    return f"**{auth}**" if auth is Auth.NONE else str(auth)


_BEGIN = """\
<!-- Made by `python -m cluster.listeners`; edit cluster/listeners.py. -->

# Ports and firewall

Every port that a cluster opens, and who is let in. A test scans an emulated cluster while a run trains: it fails when anything listens that
is not here, or wider than it says here, and it asks every port of Ray without the token and with a wrong one.

*Interface* is the widest that is bound: `own address` is the one address by which the cluster knows the machine (on an emulated cluster a
loopback address of its own). *token* means that every request has to show the cluster's token: 256 random bits, made for each cluster, in a
file with mode 0600 on your machine and in Secret Manager for VMs, never in arguments, environment, labels, metadata or logs. The token is
not encrypted on its way, so the network has to be yours. Besides, the gRPC servers of Ray tell everybody that they are well,
the names of their services, and their counts of connections (channelz).

"""

_END = """\
## The firewall that a cluster on Google Cloud needs

What asks nobody (**in bold** above) is meant for the inside of the VPC. A VPC lets nothing in by itself; these rules let the cluster's
VMs talk to each other, Google's Identity-Aware Proxy talk to port 22, and nobody else in. `cluster.tags` gives the tag to head and hosts.

```bash
gcloud compute firewall-rules create podlaunch-inside --network=podlaunch --direction=INGRESS --allow=tcp,udp,icmp \\
  --source-tags=podlaunch --target-tags=podlaunch
gcloud compute firewall-rules create podlaunch-iap-ssh --network=podlaunch --direction=INGRESS --allow=tcp:22 \\
  --source-ranges=35.235.240.0/20 --target-tags=podlaunch
gcloud compute firewall-rules create podlaunch-nobody-else --network=podlaunch --direction=INGRESS --action=DENY --rules=all \\
  --source-ranges=0.0.0.0/0 --priority=65000 --target-tags=podlaunch
```

Ports are free ones, chosen at every start, so the first rule names none. The third one repeats what a VPC does by itself, and holds where a
network has wider rules of a lower priority, such as those that Google puts into the network `default`, which let SSH and ICMP in from
everywhere: give those a look, `gcloud compute firewall-rules list --filter=network=podlaunch`. Then start the cluster in it:

<!-- not run: needs Google Cloud; docs/first-day-on-google-cloud.md starts slices with these settings -->
```bash
tpu start v5e network=podlaunch subnetwork=podlaunch external_ips=false tags=[podlaunch]
```

With `cluster.head=here` the hosts reach the head on your machine, so your machine has to be in the VPC and bear the tag.
With `cluster.head_access=direct` whoever asks the dashboard has to be in it too, and `tpu status` says that it is open there.
"""


if __name__ == "__main__":
    print(document(), end="")
