"""A host whose image holds nothing of ours installs the real bundle, with every outbound connection blocked."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from cluster import local
from cluster.config import ClusterConfig
from cluster.vm.bundle import bundle_hash, ensure_bundle
from cluster.vm.wheelhouse import LOCK_FILE
from tests.integration.bare_hosts import own_namespace
from tests.integration.conftest import ROOT

pytestmark = pytest.mark.timeout(600)

CONFIG = ClusterConfig(name="bare", cloud="emulated", accelerator_type="v4-8", min_slices=1, bucket="bare-bucket")


def unshare() -> list[str]:
    """The command that runs another in a network namespace of its own, as root or as a user who may make one."""
    command = ["unshare", "--net", "--"] if os.getuid() == 0 else ["unshare", "--map-root-user", "--net", "--"]
    try:
        tried = subprocess.run([*command, "true"], capture_output=True, text=True, timeout=20, check=False)
        words = tried.stderr.strip() if tried.returncode else ""
    except FileNotFoundError:
        words = "there is no unshare here"
    if words and not os.environ.get("CI"):
        pytest.skip(f"no network namespace can be made: {words}")
    assert not words
    return command


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, Any]]:
    """The bundle is built and stored with the network there; then everything happens again without it, on what lies on the disk."""
    command = unshare()
    base = Path(tempfile.mkdtemp(prefix="podlaunch-test-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PODLAUNCH_STATE_DIR", str(base / "state"))
        patch.setenv("PODLAUNCH_CACHE_DIR", str(base / "cache"))
        try:
            ensure_bundle(local.with_local_endpoints(CONFIG, ""), print)
            local.stop_emulator()
            driver = [sys.executable, "-m", "tests.integration.bare_hosts", json.dumps(CONFIG.to_dict()), own_namespace()]
            env = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run([*command, *driver], env=env, cwd=ROOT, capture_output=True, text=True, timeout=480, check=False)
            logs = "".join(f"{path}\n{path.read_text()}" for path in base.glob("state/emulator/hosts/*/serial.log"))
            assert done.returncode == 0, f"{done.stdout}{done.stderr}{logs}"
            result = json.loads(done.stdout.splitlines()[-1])
            print({key: result[key] for key in ("seconds_to_join", "seconds_to_join_again")})
            yield result
        finally:
            local.stop_emulator()
            shutil.rmtree(base)


def test_nothing_outside_can_be_reached(found: dict[str, Any]) -> None:
    assert found["outside"] == ["ENETUNREACH", "ENETUNREACH"]
    namespaces = {agent["namespace"] for agent in found["agents"]}
    assert len(namespaces) == 1  # the hosts' processes are in the one that was tried
    assert own_namespace() not in namespaces


def test_host_has_every_locked_version_and_our_wheel(found: dict[str, Any]) -> None:
    locked = dict(re.findall(r"^([a-z0-9._-]+)==(\S+)$", LOCK_FILE.read_text(), flags=re.MULTILINE))
    installed = {re.sub(r"[-_.]+", "-", name).lower(): number for name, number in found["versions"].items()}
    assert {"ray", "jax", "jaxlib", "libtpu", "google-cloud-tpu", "gcsfs"} <= installed.keys()
    assert {name: number for name, number in installed.items() if locked.get(name, number) != number} == {}
    assert installed["podlaunch"] == version("podlaunch")
    assert "No broken requirements found" in found["pip_check"]


def test_agent_and_raylet_run_from_the_installed_bundle(found: dict[str, Any]) -> None:
    folder = f"{found['home']}/bundles/{bundle_hash()}/"
    assert f"{found['prefix']}/" == folder
    for program in ("host_agent", "raylet/raylet"):
        commands = [agent["command"] for agent in found["agents"] if program in " ".join(agent["command"])]
        assert len(commands) == 2  # one a boot
        assert all(command[0].startswith(folder) for command in commands)


def test_second_boot_installs_nothing(found: dict[str, Any]) -> None:
    assert found["joined_anew"]
    assert found["serial_log"].count("podlaunch: installing bundle") == 1
    assert found["serial_log"].count("podlaunch: installed in") == 1
    assert set(found["left_in_home"]) == {"bin", "bundle.sha256", "bundles", "host", "install.lock"}
    assert found["seconds_to_join_again"] < found["seconds_to_join"]
