"""Installs the bundle on a VM. It runs before anything of ours is there, with whatever Python the image has (3.8 or later): one file,
nothing but the standard library. The startup script carries its text.

    $PODLAUNCH_HOME/
      bundle.sha256      the hash of the bundle that works; written last
      bin/python         starts that bundle's Python
      bundles/<hash>/    its virtual environment
      pythons/<sha256>/  the Python that came with it, where the bundle has one
      downloads/         files that are complete and checked, until the bundle works

It may be killed at any point and run again: what is there and good is kept, the bundle before works until the new one does.
"""

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

PATIENCE_S = 900.0
"""How long the bucket may be out of reach before this boot is given up."""
REQUEST_S = 30.0
LONGEST_PAUSE_S = 30.0
AT_ONCE = 8
BLOCK_BYTES = 2**20


class InstallError(Exception):
    """Why this host cannot be installed, in one line."""


class GoneError(InstallError):
    """Asking again does not help."""


def say(words: str) -> None:
    """One line in the log of the boot."""
    print("podlaunch: " + words, file=sys.stderr, flush=True)


def tell_trouble(metadata_host: str, words: str) -> None:
    """Publish why this host cannot join its cluster, as a guest attribute, where `tpu status` finds it. Only TPU hosts have a number, and
    a machine whose metadata does not allow it has the words in the log of its boot alone.
    """
    headers = {"Metadata-Flavor": "Google"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # link-local: never through a proxy
    base = f"http://{metadata_host}/computeMetadata/v1/instance/"
    with contextlib.suppress(OSError, http.client.HTTPException):
        with opener.open(urllib.request.Request(base + "attributes/agent-worker-number", headers=headers), timeout=5) as answer:
            body = f"worker {answer.read().decode().strip()}: {words}".encode()
        request = urllib.request.Request(base + "guest-attributes/podlaunch/trouble", data=body, headers=headers, method="PUT")
        opener.open(request, timeout=5).close()


class Store:
    """The bucket, read with the VM's own identity."""

    def __init__(
        self,
        place: Dict[str, str],
        metadata_host: str,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._place, self._metadata_host, self._sleep, self._clock = place, metadata_host, sleep, clock
        self._deadline = clock() + PATIENCE_S

    def fetch(self, name: str, sha256: str, target: Path) -> None:
        """Make `target` the object `name`, whose content has that digest. Raises InstallError when that cannot be had in time."""
        if target.exists() and digest(target) == sha256:
            return
        pause = 1.0
        while True:
            try:
                self._fetch_once(name, sha256, target)
                return
            except GoneError:
                raise
            except (OSError, http.client.HTTPException, InstallError) as error:
                where = f"gs://{self._place['bucket']}/{name}"
                if self._clock() + pause > self._deadline:
                    raise InstallError(f"cannot fetch {where}: {error}") from error
                say(f"cannot fetch {where}: {error}; trying again in {pause:.0f} s")
                self._sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)

    def _fetch_once(self, name: str, sha256: str, target: Path) -> None:
        partial = target.with_name(target.name + ".part")
        url = f"{self._place['endpoint']}/storage/v1/b/{self._place['bucket']}/o/{urllib.parse.quote(name, safe='')}?alt=media"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self._token()}"})
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_S) as answer, partial.open("wb") as file:
                shutil.copyfileobj(answer, file, BLOCK_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                kind = GoneError if error.code == 404 else InstallError
                hint = "; grant roles/storage.objectViewer on the bucket to the VM's service account" if error.code in (401, 403) else ""
                raise kind(f"the bucket answers {error.code} {error.reason} for gs://{self._place['bucket']}/{name}{hint}") from error
        found = digest(partial)
        if found != sha256:
            partial.unlink()
            raise InstallError(f"its sha256 is {found}, not {sha256}")
        partial.replace(target)

    def _token(self) -> str:
        path = "instance/service-accounts/default/token"
        request = urllib.request.Request(f"http://{self._metadata_host}/computeMetadata/v1/{path}", headers={"Metadata-Flavor": "Google"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # link-local: never through a proxy
        try:
            with opener.open(request, timeout=REQUEST_S) as answer:
                return str(json.loads(answer.read())["access_token"])
        except urllib.error.HTTPError as error:
            with error:
                raise InstallError(f"the metadata server gives no access token ({error.code}): the VM needs a service account") from error


def install(home: Path, place: Dict[str, str], store: Store, run: Callable[..., Any] = subprocess.run) -> None:
    """Install the bundle that `place` names. Raises InstallError, after which what worked before still works."""
    wanted = place["bundle"]
    downloads = home / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    with _only_one(home):
        if present(home) == wanted:
            return
        manifest = _manifest(place, store, downloads)
        if not (home / "bundles" / wanted).exists():
            with _timed("fetched"):
                _fetch_all(manifest["files"], store, downloads)
            with _timed("unpacked"):
                python = _python(home, manifest, downloads, run)
                _make_environment(home, wanted, python, manifest, downloads, run)
        with _timed("checked"):
            _check(home, wanted, place["check"], run)
        with _timed("written"):
            _switch(home, wanted)
            _tidy(home, wanted, manifest)


def present(home: Path) -> str:
    """The hash of the bundle that works; empty when none does."""
    try:
        return (home / "bundle.sha256").read_text().strip()
    except FileNotFoundError:
        return ""


def digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(BLOCK_BYTES), b""):
            found.update(block)
    return found.hexdigest()


def _manifest(place: Dict[str, str], store: Store, downloads: Path) -> Dict[str, Any]:
    path = downloads / "manifest.json"
    store.fetch(place["blob"], place["sha256"], path)
    manifest: Dict[str, Any] = json.loads(path.read_text())
    return manifest


def _fetch_all(files: List[Dict[str, Any]], store: Store, downloads: Path) -> None:
    size = sum(file["size"] for file in files) / 1e6
    say(f"fetching {len(files)} files, {size:.0f} MB")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        # The longest first, so that none of them is waited for alone at the end.
        largest_first = sorted(files, key=lambda file: -int(file["size"]))
        wanted = [pool.submit(store.fetch, file["blob"], file["sha256"], downloads / file["name"]) for file in largest_first]
        try:
            for each in wanted:
                each.result()
        except BaseException:
            for each in wanted:
                each.cancel()
            raise


def _python(home: Path, manifest: Dict[str, Any], downloads: Path, run: Callable[..., Any]) -> Path:
    """The bundle's own Python, since all hosts and the head then have the very same one; else the image's of the same minor version."""
    version = manifest["python"]
    archive = next((file for file in manifest["files"] if file["kind"] == "python"), None)
    if archive is not None:
        folder: Path = home / "pythons" / archive["sha256"]
        if not folder.exists():
            partial = _fresh(folder.with_name(folder.name + ".partial"))
            with tarfile.open(downloads / archive["name"]) as tar:
                # Written out since the default changes from version to version, and the oldest have no such filter.
                tar.extraction_filter = getattr(tarfile, "tar_filter", lambda member, _: member)
                tar.extractall(partial)
            partial.rename(folder)
        return folder / "bin" / f"python{version}"
    program = _image_python(version, run)
    if program is None:
        raise InstallError(
            f"this image has no Python {version} and the bundle carries none; choose an image that has it, "
            "or start the cluster once from a machine that can reach GitHub, from where the bundle's Python comes"
        )
    return program


def _image_python(version: str, run: Callable[..., Any]) -> Optional[Path]:
    name = f"python{version}"
    found = shutil.which(name)
    if found is None:
        return None
    question = [found, "-I", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    answer = run(question, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
    # Some version managers leave a program of that name that only says that the version is not installed.
    return Path(found) if answer.returncode == 0 and answer.stdout.decode().strip() == version else None


def _make_environment(home: Path, wanted: str, python: Path, manifest: Dict[str, Any], downloads: Path, run: Callable[..., Any]) -> None:
    """The virtual environment, under another name until it is complete."""
    partial = _fresh(home / "bundles" / f"{wanted}.partial")
    uv = _uv(manifest, downloads)
    options = ["--quiet", "--no-config", "--offline", "--cache-dir", str(home / "cache")]
    wheels = [str(downloads / file["name"]) for file in manifest["files"] if file["kind"] == "wheel"]
    _call([str(uv), "venv", *options, "--relocatable", "--python", str(python), str(partial)], run)
    target = ["--python", str(partial / "bin" / "python")]
    # Exactly the files of the bundle: nothing is looked for, and nothing is resolved once more.
    _call([str(uv), "pip", "install", *options, *target, "--no-index", "--no-deps", *wheels], run)
    partial.rename(home / "bundles" / wanted)


def _uv(manifest: Dict[str, Any], downloads: Path) -> Path:
    """The installer, out of its wheel."""
    program = downloads / "uv"
    name = next(file["name"] for file in manifest["files"] if file["name"].startswith("uv-"))
    with zipfile.ZipFile(downloads / name) as wheel:
        inside = next(entry for entry in wheel.namelist() if entry.endswith(".data/scripts/uv"))
        with wheel.open(inside) as source, program.open("wb") as target:
            shutil.copyfileobj(source, target, BLOCK_BYTES)
    program.chmod(0o755)
    return program


def _check(home: Path, wanted: str, check: str, run: Callable[..., Any]) -> None:
    """Let the new bundle prove itself."""
    try:
        _call([str(home / "bundles" / wanted / "bin" / "python"), "-c", check], run)
    except InstallError:
        # Made anew at the next boot: what was written just before a crash of the machine may lack its content.
        shutil.rmtree(home / "bundles" / wanted)
        raise


def _switch(home: Path, wanted: str) -> None:
    """Make the new bundle the one that works."""
    python = home / "bundles" / wanted / "bin" / "python"
    (home / "bin").mkdir(exist_ok=True)
    # Not a link: Python looks for its virtual environment beside the path by which it was called.
    _write(home / "bin" / "python", f'#!/bin/sh\nexec "{python}" "$@"\n', 0o755)
    os.sync()  # the hash must not reach the disk before that of which it tells
    _write(home / "bundle.sha256", wanted + "\n", 0o644)


def _tidy(home: Path, wanted: str, manifest: Dict[str, Any]) -> None:
    """Remove what was needed on the way, and the bundles before."""
    shutil.rmtree(home / "downloads")
    shutil.rmtree(home / "cache", ignore_errors=True)
    keep = {wanted, *(file["sha256"] for file in manifest["files"] if file["kind"] == "python")}
    for folder in (home / "bundles", home / "pythons"):
        for old in folder.iterdir() if folder.exists() else ():
            if old.name not in keep:
                shutil.rmtree(old, ignore_errors=True)


def _call(command: List[str], run: Callable[..., Any]) -> None:
    done = run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        said = " ".join(done.stdout.decode(errors="replace").split())
        raise InstallError(f"{Path(command[0]).name} {command[1]} ended with code {done.returncode}: {said[-2000:]}")


def _fresh(path: Path) -> Path:
    """An empty place: what a killed run left there is removed."""
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    return path


def _write(path: Path, text: str, mode: int) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.chmod(mode)
    partial.replace(path)


@contextlib.contextmanager
def _only_one(home: Path) -> Iterator[None]:
    """One installation at a time; the lock goes with the process."""
    with (home / "install.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _timed(what: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    say(f"{what} in {time.monotonic() - started:.1f} s")


def main() -> int:
    """`python3 install.py PLACE`, where PLACE is JSON: {endpoint, bucket, blob, sha256, bundle, check}."""
    started = time.monotonic()
    home = Path(os.environ["PODLAUNCH_HOME"])
    place = json.loads(sys.argv[1])
    say(f"installing bundle {place['bundle'][:12]} from gs://{place['bucket']}/{place['blob']}")
    metadata_host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    try:
        install(home, place, Store(place, metadata_host))
    except (InstallError, OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        words = f"this host cannot be installed: {error}"
        say(words)
        tell_trouble(metadata_host, words)
        return 1
    say(f"installed in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
