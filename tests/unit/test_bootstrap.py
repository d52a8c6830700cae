"""The startup script, run by a real bash."""

import json
import os
import subprocess
import sys
from pathlib import Path

from cluster.vm.bootstrap import startup_script
from cluster.vm.bundle import BundleLocation

BUNDLE = "cafe" * 16
LOCATION = BundleLocation("http://127.0.0.1:1", "my-bucket", "bundles/it's.json", "beef")
METADATA_LIMIT = 256 * 1024
LONGEST_COMMANDS = 128 * 1024


def boot(script: str, home: Path, path: str | None = None, metadata_host: str = "127.0.0.1:1") -> "subprocess.CompletedProcess[str]":
    env = {"PODLAUNCH_HOME": str(home), "PATH": os.environ["PATH"] if path is None else path, "GCE_METADATA_HOST": metadata_host}
    return subprocess.run(["/bin/bash", "-c", script], env=env, capture_output=True, text=True, timeout=60, check=False)


def make_image(home: Path, bundle: str) -> None:
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python").write_text('#!/bin/sh\necho "agent: $*, home $PODLAUNCH_HOME"\n')
    (home / "bin" / "python").chmod(0o755)
    (home / "bundle.sha256").write_text(bundle)


def make_python3(folder: Path, code: int) -> str:
    """A PATH whose python3 writes down what it is given."""
    folder.mkdir()
    program = folder / "python3"
    program.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {folder}/arguments\ncat > {folder}/program\nexit {code}\n')
    program.chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def test_image_with_the_bundle_starts_the_agent_at_once(tmp_path: Path) -> None:
    make_image(tmp_path, BUNDLE)
    for script in (startup_script(BUNDLE), startup_script(BUNDLE, LOCATION)):
        done = boot(script, tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"agent: -m cluster.vm.host_agent, home {tmp_path}\n", "")


def test_another_agent_can_be_named(tmp_path: Path) -> None:
    make_image(tmp_path, BUNDLE)
    done = boot(startup_script(BUNDLE, LOCATION, agent="cluster.vm.head_agent '/a b'"), tmp_path)
    assert done.stdout == f"agent: -m cluster.vm.head_agent /a b, home {tmp_path}\n"


def test_other_image_without_a_bucket_is_refused(tmp_path: Path) -> None:
    make_image(tmp_path, "beef")
    done = boot(startup_script(BUNDLE), tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"podlaunch: this image holds the bundle 'beef', the cluster wants '{BUNDLE}' and has no bucket to get it from\n"


def test_bare_image_is_installed_then_the_agent_starts(tmp_path: Path) -> None:
    path = make_python3(tmp_path / "path", 0)
    make_image(tmp_path / "home", "")
    done = boot(startup_script(BUNDLE, LOCATION, agent="cluster.vm.head_agent"), tmp_path / "home", path)
    assert (done.returncode, done.stdout) == (0, f"agent: -m cluster.vm.head_agent, home {tmp_path}/home\n")
    *options, place = (tmp_path / "path" / "arguments").read_text().splitlines()
    assert options == ["-I", "-"]
    where = {"endpoint": "http://127.0.0.1:1", "bucket": "my-bucket", "blob": "bundles/it's.json", "sha256": "beef"}
    assert json.loads(place) == {**where, "bundle": BUNDLE, "check": "import cluster.vm.head_agent, ray, jax"}
    source = Path(sys.modules["cluster.vm.bundle"].__file__ or "").parent / "install.py"
    assert (tmp_path / "path" / "program").read_text() == source.read_text()


def test_failed_installation_starts_no_agent(tmp_path: Path) -> None:
    make_image(tmp_path / "home", "beef")
    done = boot(startup_script(BUNDLE, LOCATION), tmp_path / "home", make_python3(tmp_path / "path", 1))
    assert (done.returncode, done.stdout) == (1, "")


def test_image_without_python_says_so(tmp_path: Path) -> None:
    (tmp_path / "cat").symlink_to("/bin/cat")
    done = boot(startup_script(BUNDLE, LOCATION), tmp_path / "home", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "podlaunch: this image has no python3, with which the bundle would be installed\n"


def test_installation_that_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    """The real program in the real script; a file is where its folder should be."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "downloads").write_text("")
    done = boot(startup_script(BUNDLE, LOCATION), tmp_path / "home")
    assert done.returncode == 1
    first, last = done.stderr.splitlines()
    assert first == "podlaunch: installing bundle cafecafecafe from gs://my-bucket/bundles/it's.json"
    assert last.startswith("podlaunch: this host cannot be installed: [Errno 17]")


def test_script_leaves_room_for_the_users_commands() -> None:
    assert len(startup_script(BUNDLE, LOCATION).encode()) + LONGEST_COMMANDS < METADATA_LIMIT
