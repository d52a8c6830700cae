"""The emulated cloud inside this process, without a daemon: for tests of whatever speaks to the Cloud TPU API."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.emulator.admin import Admin
from cluster.emulator.api import Api
from cluster.emulator.clock import Clock, RealClock
from cluster.emulator.cloud import Cloud
from cluster.emulator.hosts import Hosts, NoHosts
from cluster.emulator.http import HttpServer
from cluster.emulator.profile import INSTANT, Profile
from cluster.emulator.rest import Rest
from cluster.emulator.server import Server
from cluster.emulator.store import Store


@dataclass(frozen=True)
class Embedded:
    """A running cloud and how it is reached."""

    cloud: Cloud
    endpoint: str
    """host:port of its Cloud TPU and Secret Manager APIs over gRPC."""
    rest: str
    """URL of the same APIs and of Compute Engine over REST."""
    admin: str
    """URL of the admin endpoint."""
    clock: Clock


@contextmanager
def embedded_emulator(
    *,
    hosts: Hosts | None = None,
    profile: Profile = INSTANT,
    database: Path | None = None,
    clock: Clock | None = None,
    cloud_class: type[Cloud] = Cloud,
) -> Iterator[Embedded]:
    """Serve until the block is left. Without `hosts`, nodes have addresses and no processes; without `database`, no memory.

    With a ManualClock nothing happens until the caller advances it; without `clock`, everything does by itself.
    """
    store = Store(database)
    clock = clock if clock is not None else RealClock()
    hosts = hosts if hosts is not None else NoHosts()
    cloud = cloud_class(store, hosts, clock, state_dir=database or Path("/"), profile=profile)
    cloud.resume()
    api = Api(cloud)
    server, rest, admin = Server(api), HttpServer(Rest(api, cloud).answer), HttpServer(Admin(cloud).answer)
    try:
        yield Embedded(cloud, server.endpoint, rest.url, admin.url, clock)
    finally:
        admin.stop()
        rest.stop()
        clock.close()  # before the server: a call that a fault holds up must not hold up the end
        server.stop(grace=0)
        hosts.close()
        store.close()
