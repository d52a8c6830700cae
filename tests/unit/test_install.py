"""The installation of a bundle on a VM: killed anywhere, fed with wrong files, without a matching Python."""

import ast
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from cluster.vm import install
from cluster.vm.install import GoneError, InstallError, Store, present

VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
TOKEN_PATH = "/computeMetadata/v1/instance/service-accounts/default/token"


class Place:
    """A bucket and a metadata server over HTTP, with what they were asked."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.failures: list[int] = []
        """Answered before anything good, one each."""
        place = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == TOKEN_PATH and self.headers["Metadata-Flavor"] == "Google":
                    self._send(200, b'{"access_token": "secret", "expires_in": 3599}')
                    return
                name = unquote(self.path.removeprefix("/storage/v1/b/my-bucket/o/").removesuffix("?alt=media"))
                place.asked.append(name)
                if self.headers["Authorization"] != "Bearer secret":
                    self._send(401, b"")
                elif place.failures:
                    self._send(place.failures.pop(0), b"")
                else:
                    self._send(200 if name in place.objects else 404, place.objects.get(name, b""))

            def _send(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Not a line for every request."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def put(self, kind: str, name: str, content: bytes) -> dict[str, Any]:
        sha256 = hashlib.sha256(content).hexdigest()
        self.objects[f"files/{sha256}/{name}"] = content
        return {"kind": kind, "name": name, "blob": f"files/{sha256}/{name}", "sha256": sha256, "size": len(content)}

    def bundle(self, name: str, *, python: str = VERSION, more: tuple[dict[str, Any], ...] = ()) -> dict[str, str]:
        """Store a bundle and return what the startup script would say of it."""
        uv = io.BytesIO()
        with zipfile.ZipFile(uv, "w") as wheel:
            wheel.writestr("uv-1.data/scripts/uv", "not looked at")
        files = [self.put("wheel", "uv-1-py3-none-any.whl", uv.getvalue()), self.put("wheel", f"{name}-1-py3-none-any.whl", name.encode())]
        manifest = json.dumps({"python": python, "files": [*files, *more]}).encode()
        self.objects[f"bundles/{name}.json"] = manifest
        sha256 = hashlib.sha256(manifest).hexdigest()
        where = {"endpoint": f"http://{self.address}", "bucket": "my-bucket", "blob": f"bundles/{name}.json", "sha256": sha256}
        return {**where, "bundle": name, "check": "check"}


class Programs:
    """uv and Python as the installation calls them; `broken` says at which call what happens."""

    def __init__(self, broken: dict[int, Callable[[], int]] | None = None) -> None:
        self.calls: list[list[str]] = []
        self._broken = broken or {}

    def __call__(self, command: list[str], **_: Any) -> "subprocess.CompletedProcess[bytes]":
        self.calls.append(command)
        code = self._broken.get(len(self.calls), lambda: 0)()
        if "venv" in command and code == 0:
            program = Path(command[-1]) / "bin" / "python"
            program.parent.mkdir(parents=True)
            program.write_text("#!/bin/sh\n")
        said = f"{VERSION}\n" if "-I" in command else "line one\nline two"
        return subprocess.CompletedProcess(command, code, said.encode())

    def wheels(self) -> list[str]:
        return [Path(word).name for command in self.calls for word in command if word.endswith(".whl")]


class KilledError(BaseException):
    """What the test's kill looks like from inside: nothing of ours catches it."""


def killed() -> int:
    raise KilledError


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    yield made
    made.stop()


def run(home: Path, place: Place, bundle: dict[str, str], programs: Programs, sleep: Callable[[float], None] = lambda _: None) -> None:
    install.install(home, bundle, Store(bundle, place.address, sleep=sleep), programs)


def impatient(bundle: dict[str, str], place: Place) -> Store:
    """Its time runs as it sleeps."""
    now = [0.0]
    return Store(bundle, place.address, sleep=lambda seconds: now.__setitem__(0, now[0] + seconds), clock=lambda: now[0])


def works(home: Path, name: str) -> bool:
    """Whether that bundle is the one that starts."""
    return present(home) == name and f"/bundles/{name}/bin/python" in (home / "bin" / "python").read_text()


def test_bundle_is_installed_and_nothing_is_left_over(place: Place, tmp_path: Path) -> None:
    programs = Programs()
    run(tmp_path, place, place.bundle("one"), programs)
    assert works(tmp_path, "one")
    assert programs.wheels() == ["uv-1-py3-none-any.whl", "one-1-py3-none-any.whl"]
    (installation,) = [command for command in programs.calls if "install" in command]
    assert {"--no-index", "--no-deps", "--offline"} <= set(installation)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "bundle.sha256", "bundles", "install.lock"]


def test_second_run_asks_for_nothing(place: Place, tmp_path: Path) -> None:
    run(tmp_path, place, place.bundle("one"), Programs())
    place.asked.clear()
    again = Programs()
    run(tmp_path, place, place.bundle("one"), again)
    assert (place.asked, again.calls) == ([], [])


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_killed_installation_leaves_the_bundle_before_and_is_finished_by_the_next(place: Place, tmp_path: Path, at: int) -> None:
    run(tmp_path, place, place.bundle("one"), Programs())
    two = place.bundle("two")
    with pytest.raises(KilledError):
        run(tmp_path, place, two, Programs({at: killed}))
    assert works(tmp_path, "one")
    place.asked.clear()
    run(tmp_path, place, two, Programs())
    assert works(tmp_path, "two")
    assert not place.asked  # what was there and good is kept
    assert [path.name for path in (tmp_path / "bundles").iterdir()] == ["two"]


def test_four_programs_are_run(place: Place, tmp_path: Path) -> None:
    """So that the test above kills at every one of them."""
    programs = Programs()
    run(tmp_path, place, place.bundle("one"), programs)
    assert len(programs.calls) == 4


def test_kill_between_the_program_and_the_hash_is_repaired(place: Place, tmp_path: Path) -> None:
    run(tmp_path, place, place.bundle("one"), Programs())
    (tmp_path / "bundle.sha256").write_text("zero\n")
    again = Programs()
    run(tmp_path, place, place.bundle("one"), again)
    assert works(tmp_path, "one")
    assert len(again.calls) == 1  # only the check


def test_torn_download_is_fetched_again(place: Place, tmp_path: Path) -> None:
    one = place.bundle("one")
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "one-1-py3-none-any.whl").write_bytes(b"on")
    run(tmp_path, place, one, Programs())
    assert works(tmp_path, "one")


def test_wrong_content_is_never_installed(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, place, place.bundle("one"), Programs())
    two = place.bundle("two")
    name = next(name for name in place.objects if name.endswith("two-1-py3-none-any.whl"))
    place.objects[name] = b"tampered with"
    programs = Programs()
    store = impatient(two, place)
    with pytest.raises(InstallError, match=rf"gs://my-bucket/{name}: its sha256 is [0-9a-f]{{64}}, not {name.split('/')[1]}"):
        install.install(tmp_path, two, store, programs)
    assert not programs.calls
    assert works(tmp_path, "one")
    assert "trying again in 1 s" in capsys.readouterr().err


def test_wrong_manifest_is_refused(place: Place, tmp_path: Path) -> None:
    one = place.bundle("one") | {"sha256": "0" * 64}
    with pytest.raises(InstallError, match="its sha256 is"):
        install.install(tmp_path, one, impatient(one, place), Programs())


def test_stumbling_bucket_is_asked_again_with_growing_pauses(place: Place, tmp_path: Path) -> None:
    one = place.bundle("one")
    place.failures = [503, 500, 403]
    pauses: list[float] = []
    run(tmp_path, place, one, Programs(), sleep=pauses.append)
    assert works(tmp_path, "one")
    assert pauses == [1.0, 2.0, 4.0]


def test_missing_manifest_is_given_up_at_once(place: Place, tmp_path: Path) -> None:
    one = place.bundle("one")
    del place.objects["bundles/one.json"]
    pauses: list[float] = []
    with pytest.raises(GoneError, match=r"answers 404 Not Found for gs://my-bucket/bundles/one\.json"):
        run(tmp_path, place, one, Programs(), sleep=pauses.append)
    assert not pauses


def test_image_without_that_python_is_refused_in_one_line(place: Place, tmp_path: Path) -> None:
    with pytest.raises(InstallError, match=r"^this image has no Python 3\.99 and the bundle carries none; choose an image") as error:
        run(tmp_path, place, place.bundle("one", python="3.99"), Programs())
    assert "\n" not in str(error.value)


def test_bundle_with_a_python_uses_that_one(place: Place, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo("bin/python3.99")
        member.size = 6
        tar.addfile(member, io.BytesIO(b"python"))
    entry = place.put("python", "python-3.99.tar.gz", packed.getvalue())
    programs = Programs()
    run(tmp_path, place, place.bundle("one", python="3.99", more=(entry,)), programs)
    python = tmp_path / "pythons" / entry["sha256"] / "bin" / "python3.99"
    assert python.read_text() == "python"
    assert next(command for command in programs.calls if "venv" in command)[-2] == str(python)
    # A bundle without it afterwards: it goes with the bundle that needed it.
    run(tmp_path, place, place.bundle("two"), Programs())
    assert not python.exists()


def test_bundle_that_does_not_work_is_not_switched_to(place: Place, tmp_path: Path) -> None:
    run(tmp_path, place, place.bundle("one"), Programs())
    two = place.bundle("two")
    with pytest.raises(InstallError, match="python -c ended with code 3: line one line two"):
        run(tmp_path, place, two, Programs({4: lambda: 3}))
    assert works(tmp_path, "one")
    run(tmp_path, place, two, Programs())
    assert works(tmp_path, "two")


def test_program_fits_the_oldest_python_of_an_image() -> None:
    ast.parse(Path(install.__file__).read_text(), feature_version=(3, 8))
