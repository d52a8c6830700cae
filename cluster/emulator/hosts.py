"""The hosts of emulated nodes and instances: one process group each, a folder as its disk and a metadata server of its own.

What a host finds is what a VM image would hold, with our bundle in it or without; nothing in it says that the cloud is emulated.
"""

import contextlib
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import psutil

from cluster import processes
from cluster.emulator.guest import GuestAttributes
from cluster.emulator.metadata import MetadataServer, entries
from cluster.emulator.model import HostRecord, Machine
from cluster.emulator.store import Store
from cluster.state import private_dir, short_dir, write_atomic

log = logging.getLogger(__name__)
_COMMAND_LIMIT_S = 120.0

_IMAGE_HASH = Path("opt/podlaunch/bundle.sha256")


class Hosts(Protocol):
    """Whatever gives machines (nodes and instances) their hosts. All calls for one machine come one after the other."""

    def start(self, machine: Machine) -> None:
        """Start what does not run yet, and write into `machine.hosts` how it is found again."""

    def halt(self, machine: Machine) -> None:
        """End every process of the machine, also what was started and not written down. Its disks stay."""

    def stop(self, machine: Machine) -> None:
        """End everything that belongs to the machine, its disks as well."""

    def signal(self, machine: Machine, host: HostRecord, number: int) -> None:
        """Send a signal to every process of one host."""

    def run(self, machine: Machine, host: HostRecord, command: str) -> tuple[int, str]:
        """Run a shell command on one host: its exit code and output."""

    def environment(self, machine: Machine, host: HostRecord) -> tuple[dict[str, str], Path] | None:
        """The environment and the folder that a process of one host starts with; None where hosts have no processes."""

    def announce(self, machine: Machine) -> None:
        """Let the hosts' metadata servers show the machine as it is now."""

    def guest_attributes(self, machine: Machine, host: HostRecord) -> dict[str, str]:
        """What one host has published about itself: `namespace/key` -> value."""

    def exited(self, host: HostRecord) -> bool:
        """Whether the host's startup script has ended."""

    def close(self) -> None:
        """Let go of what the daemon itself serves; hosts live on."""


class NoHosts:
    """Hosts that are addresses only: for tests of clients of the API, and for thousands of nodes."""

    def start(self, machine: Machine) -> None:
        """Nothing to start."""

    def halt(self, machine: Machine) -> None:
        """Nothing to end."""

    def stop(self, machine: Machine) -> None:
        """Nothing to end."""

    def signal(self, machine: Machine, host: HostRecord, number: int) -> None:
        """No process to send it to."""

    def run(self, machine: Machine, host: HostRecord, command: str) -> tuple[int, str]:  # noqa: ARG002  # the protocol's signature
        return 255, "there is no such host"

    def environment(self, machine: Machine, host: HostRecord) -> tuple[dict[str, str], Path] | None:  # noqa: ARG002  # as above
        return None

    def announce(self, machine: Machine) -> None:
        """Nobody to tell."""

    def guest_attributes(self, machine: Machine, host: HostRecord) -> dict[str, str]:  # noqa: ARG002  # the protocol's signature
        return {}

    def exited(self, host: HostRecord) -> bool:  # noqa: ARG002  # the protocol's signature
        return False

    def close(self) -> None:
        """Nothing to let go of."""


class ProcessHosts:
    """Hosts as processes of this machine, each running its machine's startup script."""

    def __init__(self, folder: Path, state_dir: Path, image_bundle: str, env: Mapping[str, str]) -> None:
        """`folder`: where the hosts' disks lie. `state_dir`: the user's state directory, where agents log. `image_bundle`: the hash of
        the bundle that the hosts' image already holds; empty: it holds nothing of ours. `env`: the daemon's environment, from which only
        the way to programs and caches is taken.
        """
        self._folder, self._state_dir, self._image_bundle, self._env = folder, state_dir, image_bundle, dict(env)
        self._servers: dict[tuple[str, int], MetadataServer] = {}
        self._lock = threading.Lock()
        self._python = None if _importable() else Path(__file__).parents[2]

    def start(self, machine: Machine) -> None:
        # All metadata servers before the first process: a startup script asks at once.
        for host in machine.hosts:
            self._serve(machine, host)
        for host in machine.hosts:
            if not (host.exited or host.held) and (host.process is None or not host.process.alive()):
                host.process = self._boot(machine, host)

    def halt(self, machine: Machine) -> None:
        for host in machine.hosts:
            processes.kill_members(marker(machine, host))
            if host.process is not None:
                processes.reap(host.process)
            with self._lock:
                server = self._servers.pop((machine.uid, host.worker), None)
            if server is not None:
                server.stop()

    def stop(self, machine: Machine) -> None:
        self.halt(machine)
        for host in machine.hosts:
            remove_disk(self._disk(machine, host))

    def signal(self, machine: Machine, host: HostRecord, number: int) -> None:
        for process in processes.members(marker(machine, host)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def run(self, machine: Machine, host: HostRecord, command: str) -> tuple[int, str]:
        env, home = self.environment(machine, host)
        try:
            done = subprocess.run(
                ["bash", "-c", command],
                env=env,
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=_COMMAND_LIMIT_S,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired as error:
            return 124, (error.output or b"").decode(errors="replace")
        return done.returncode, done.stdout.decode(errors="replace")

    def environment(self, machine: Machine, host: HostRecord) -> tuple[dict[str, str], Path]:
        disk = self._disk(machine, host)
        return {**self._environment(machine, host, disk), processes.MARKER: marker(machine, host)}, disk / "home"

    def announce(self, machine: Machine) -> None:
        for host in machine.hosts:
            with self._lock:
                server = self._servers.get((machine.uid, host.worker))
            if server is not None:
                server.show(entries(machine, host.worker))

    def guest_attributes(self, machine: Machine, host: HostRecord) -> dict[str, str]:
        return self._guest(machine, host).values()

    def exited(self, host: HostRecord) -> bool:
        if host.process is None:
            return False
        processes.reap(host.process)
        return not host.process.alive()

    def close(self) -> None:
        for server in self._servers.values():
            server.stop()
        self._servers.clear()

    def _serve(self, machine: Machine, host: HostRecord) -> None:
        if (machine.uid, host.worker) not in self._servers:
            private_dir(self._disk(machine, host))
            server = MetadataServer(host.ip, host.metadata_port, entries(machine, host.worker), self._guest(machine, host))
            host.metadata_port = server.port
            with self._lock:
                self._servers[machine.uid, host.worker] = server

    def _boot(self, machine: Machine, host: HostRecord) -> processes.ProcessRecord:
        """Run the startup script; on a disk from before, as at a reboot."""
        disk = private_dir(self._disk(machine, host))
        home = private_dir(disk / "home")
        script = disk / "startup-script"
        write_atomic(script, machine.startup_script, mode=0o700)
        if self._image_bundle and not (disk / _IMAGE_HASH).exists():  # a reboot does not bring the image back
            self._install_image(disk)
        self._install_devices(machine, disk)
        log.info("host %s-w-%d boots at %s", machine.title, host.worker, host.ip)
        argv = ["bash", str(script)]
        return processes.spawn(
            argv, marker=marker(machine, host), env=self._environment(machine, host, disk), log=disk / "serial.log", cwd=home
        )

    def _install_image(self, disk: Path) -> None:
        opt = private_dir(disk / "opt" / "podlaunch")
        program = private_dir(opt / "bin") / "python"
        # A wrapper, not a link: Python looks for its virtual environment beside the path by which it was called.
        path = f"PYTHONPATH={shlex.quote(str(self._python))} " if self._python is not None else ""
        write_atomic(program, f'#!/bin/sh\n{path}exec {shlex.quote(sys.executable)} "$@"\n', mode=0o700)
        write_atomic(disk / _IMAGE_HASH, self._image_bundle)

    def _install_devices(self, machine: Machine, disk: Path) -> None:
        """A file for every chip, where a TPU VM has a device."""
        folder = private_dir(disk / "dev")
        for chip in range(machine.chips_per_host):
            (folder / f"accel{chip}").touch()

    def _environment(self, machine: Machine, host: HostRecord, disk: Path) -> dict[str, str]:
        """From scratch: a host must not inherit what happens to be set where the daemon was started."""
        caches = self._env.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        chips = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={machine.chips_per_host}"} if machine.chips_per_host else {}
        passed = {name: self._env[name] for name in ("PODLAUNCH_CACHE_DIR",) if name in self._env}
        return {
            "PATH": self._env.get("PATH", os.defpath),
            "HOME": str(disk / "home"),
            "LANG": "C.UTF-8",
            "TMPDIR": str(short_dir(disk)),
            # Ray's processes rename themselves over their environment otherwise, and with it over the mark by which we find them.
            "SPT_NOENV": "1",
            "GCE_METADATA_HOST": f"{host.ip}:{host.metadata_port}",
            "PODLAUNCH_HOME": str(disk / "opt" / "podlaunch"),
            "PODLAUNCH_DEVICES": str(disk / "dev"),
            "PODLAUNCH_STATE_DIR": str(self._state_dir),
            "XDG_CACHE_HOME": caches,
            "JAX_PLATFORMS": "cpu",
            "PYTHONSAFEPATH": "1",
            **chips,
            **passed,
        }

    def _guest(self, machine: Machine, host: HostRecord) -> GuestAttributes:
        return GuestAttributes(self._disk(machine, host) / "guest-attributes.json")

    def _disk(self, machine: Machine, host: HostRecord) -> Path:
        return self._folder / f"{machine.uid}-w-{host.worker}"


def marker(machine: Machine, host: HostRecord) -> str:
    """By what the processes of a host are known, even those that nobody wrote down."""
    return f"host-{machine.uid}-w-{host.worker}"


def address(state_dir: Path, index: int, worker: int) -> str:
    """The loopback address of a host: 127.<by the state directory>.<by the slice>.<by the worker>.

    `index` counts blocks of 254 hosts; two state directories of one machine begin at different addresses.
    """
    start = int.from_bytes(hashlib.sha256(str(state_dir).encode()).digest()[:4], "big")
    block = index + worker // 254
    return f"127.{16 + (start + block // 254) % 224}.{1 + block % 254}.{1 + worker % 254}"


def new_hosts(store: Store, state_dir: Path, count: int) -> list[HostRecord]:
    """Hosts with addresses that no earlier machine had, as far as the loopback network reaches."""
    index = int(store.get("next_index", "0"))
    store.set("next_index", str(index + -(-count // 254)))
    return [HostRecord(worker, address(state_dir, index, worker)) for worker in range(count)]


def remove_disk(disk: Path) -> None:
    """Remove a host's folder and its short twin. What a dying process writes meanwhile is left for the next time."""
    shutil.rmtree(short_dir(disk), ignore_errors=True)
    shutil.rmtree(disk, ignore_errors=True)


def _importable() -> bool:
    """Whether a Python process finds this package by itself. It does when it is installed, and not in a bare checkout."""
    return subprocess.run([sys.executable, "-I", "-c", "import cluster.emulator"], capture_output=True, check=False).returncode == 0
