"""The emulated cloud as a daemon of this machine.

    <folder>/lock            held while a daemon runs
    <folder>/endpoint.json   {grpc, rest, admin, storage, profile, process, image_bundle}: written when it serves
    <folder>/cloud.sqlite3   what outlives it
    <folder>/hosts/          the disks of its hosts
    <folder>/storage/        what its object storage holds

A daemon that ends, in whatever way, leaves nodes, instances, their hosts and stored objects as they are; the next one finds them again and
serves on the same ports.
"""

import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

import psutil

from cluster import processes
from cluster.emulator.admin import Admin
from cluster.emulator.api import Api
from cluster.emulator.clock import RealClock
from cluster.emulator.cloud import Cloud
from cluster.emulator.faults import FAULTS, STRUCK, STRUCK_COMPUTE
from cluster.emulator.hosts import ProcessHosts, marker, remove_disk
from cluster.emulator.http import HttpServer
from cluster.emulator.model import Machine, NodeRecord
from cluster.emulator.place import Endpoint, daemon_marker, only_one, write_endpoint
from cluster.emulator.profile import DEFAULT_PROFILE, INSTANT, Profile
from cluster.emulator.rest import Rest
from cluster.emulator.server import Server
from cluster.emulator.storage import Storage, storage_binary
from cluster.emulator.store import Store
from cluster.processes import ProcessRecord
from cluster.state import private_dir

_WATCH_SECONDS = 0.5


def serve(
    folder: Path,
    state_dir: Path,
    image_bundle: str,
    *,
    env: Mapping[str, str],
    stop: threading.Event,
    profile: Profile = INSTANT,
    profile_name: str = DEFAULT_PROFILE,
) -> None:
    """Serve until `stop` is set. `state_dir`: where the agents on its hosts log.

    Raises ClusterError when another daemon serves `folder`.
    """
    with only_one(folder, patience=5.0):
        store = Store(folder / "cloud.sqlite3")
        hosts = ProcessHosts(private_dir(folder / "hosts"), state_dir, image_bundle, env)
        clock = RealClock()
        cloud = Cloud(store, hosts, clock, state_dir=state_dir, profile=profile)
        cloud.resume()
        api = Api(cloud)
        server = Server(api, int(store.get("port", "0")))
        rest = HttpServer(Rest(api, cloud).answer, int(store.get("rest_port", "0")))
        binary = storage_binary()
        storage = Storage(folder, binary) if binary is not None else None
        if storage is not None:
            storage.start()
        admin = HttpServer(Admin(cloud, storage).answer, int(store.get("admin_port", "0")))
        for key, port in (("port", server.port), ("rest_port", rest.port), ("admin_port", admin.port)):
            store.set(key, str(port))
        storage_url = storage.url if storage is not None else ""
        own = _own_record(folder)
        write_endpoint(folder, Endpoint(server.endpoint, rest.url, admin.url, profile_name, own, image_bundle, storage_url))
        try:
            while not stop.wait(_WATCH_SECONDS):
                cloud.watch_hosts()
                if storage is not None:
                    storage.watch()
        finally:
            (folder / "endpoint.json").unlink(missing_ok=True)
            # The clock before the server: a call that a fault holds up must not hold up the end.
            for close in (admin.stop, rest.stop, clock.close, server.stop, hosts.close, store.close):
                close()
            if storage is not None:
                storage.stop()


def purge(folder: Path) -> int:
    """End all hosts and forget all nodes, instances, secrets and rules, without a daemon. Returns how many nodes and instances there were.

    Stored objects stay. Raises ClusterError while a daemon runs.
    """
    with only_one(folder, patience=5.0):
        if not (folder / "cloud.sqlite3").exists():
            return 0
        store = Store(folder / "cloud.sqlite3")
        machines: list[Machine] = [*store.nodes(), *store.instances()]
        for machine in machines:
            for host in machine.hosts:
                processes.kill_members(marker(machine, host))
                remove_disk(folder / "hosts" / f"{machine.uid}-w-{host.worker}")
            (store.remove_node if isinstance(machine, NodeRecord) else store.remove_instance)(machine.path)
        for queued in store.queued():
            store.remove_queued(queued.path)
        store.remove_secrets()
        for rules in (FAULTS, STRUCK, STRUCK_COMPUTE, "capacity", "quota", "unreachable"):
            store.unset(rules)  # of the cloud that ends here; the next one begins without
        store.close()
        shutil.rmtree(folder / "hosts", ignore_errors=True)
        return len(machines)


def _own_record(folder: Path) -> ProcessRecord:
    own = os.environ.get(processes.MARKER)
    # One in the foreground may have inherited somebody else's mark, by which that one's processes would be ended together with it.
    mark = own if own == daemon_marker(folder) else f"emulator-in-the-foreground-{os.getpid()}"
    return ProcessRecord(os.getpid(), psutil.Process().create_time(), mark)
