"""A host's copy of a run directory on gs://: what training reads is fetched, what it writes is sent while it writes.

A training process sees a local folder, wherever the run directory is; only checkpoints go straight to their place. What is sent is sent
from the runner, which outlives its training process: the last words of a process that was killed are not lost.

    growing      logs/<attempt>/host-<i>.log and .times of this host; metrics.jsonl and samples.jsonl of host 0        in segments
    replaced     tensorboard/ of host 0                                                   when they grew, at most every REPLACE_INTERVAL_S
    at once      profiles/
    at the end   export/ of host 0                                                        when the process has ended
"""

import dataclasses
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import yaml

from cluster.errors import PodlaunchError
from launcher import code
from launcher.log_times import INTERVAL_S, LogTimes, times_of
from launcher.profiles import FOLDER as PROFILES
from launcher.run_files import ObjectFiles, RunFiles
from launcher.runs import DATA, SAMPLES, RunDirectory

logger = logging.getLogger(__name__)

SEND_INTERVAL_S = 2.0
"""Cloud Storage bills by the request; who follows a run looks as often."""
REPLACE_INTERVAL_S = 30.0


class Place(Protocol):
    """What the training process of one host has of its run's directory."""

    folder: Path
    """Where it reads and writes."""
    checkpoints: str
    """Where its checkpoints go: a local path or gs://."""

    @property
    def files(self) -> RunFiles:
        """Those of the run directory itself."""

    def fetch(self, attempt: int) -> bytes:
        """Make the folder ready for this attempt. Returns the run's code. Raises PodlaunchError."""

    def keep_sending(self, ended: threading.Event) -> None:
        """Send what the process writes, until `ended`."""

    def finish(self) -> None:
        """Send the rest, after its end. Raises PodlaunchError."""


class Mirror:
    """Of a run directory on gs://."""

    def __init__(
        self, run: RunDirectory, files: ObjectFiles, folder: Path, host: int, cache: Path, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`files`: those of `run`. `folder`: of this host's own. `host`: the index in the gang. `cache`: where the run's data is unpacked,
        once for each content. `clock`: monotonic seconds.
        """
        self._run, self.files, self.folder, self._host, self._cache, self._clock = run, files, folder, host, cache, clock
        self.checkpoints = run.checkpoints
        self._lock = threading.Lock()
        self._sent: dict[str, int] = {}
        """Bytes of each growing file, and the length of each replaced one, that are there already."""
        self._replaced = float("-inf")
        self._growing: list[str] = []
        self._times = LogTimes()

    def fetch(self, attempt: int) -> bytes:
        """A fresh folder for this attempt; what the training process writes from now on is this attempt's. Returns the run's code.

        Raises PodlaunchError when the place does not answer or lacks something.
        """
        with self._lock:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            config = self._run.config()
            if config.data is not None and (data := self.files.read(DATA)) is not None:
                sent = code.sent_paths(config.data, code.unpack(data, self._cache / "data"))
                config = dataclasses.replace(config, data=config.data.with_paths(sent))
            (self.folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")
            if self._host == 0:  # from which the best interval between checkpoints is told
                (self.folder / "events.jsonl").write_bytes(self.files.read_grown("events.jsonl"))
            self._sent, self._replaced = {}, float("-inf")
            log = Path(self._run.log_name(attempt, self._host))
            self._times = LogTimes(self.folder / log)
            self._growing = [str(log), str(times_of(log)), *(["metrics.jsonl", SAMPLES] if self._host == 0 else [])]
            return self._run.read_code()

    def keep_sending(self, ended: threading.Event) -> None:
        """Until `ended`. A place that does not answer is tried again: nothing counts as sent before it is there."""
        sent = self._clock()
        while not ended.wait(INTERVAL_S):
            self._times.look()
            if self._clock() - sent < SEND_INTERVAL_S:
                continue
            sent = self._clock()
            try:
                self.send()
            except (PodlaunchError, OSError) as error:
                logger.warning("what %s wrote is not sent yet: %s", self._run.run_id, error)

    def send(self) -> None:
        """What is new. Raises PodlaunchError when the place does not answer; the next call goes on from there."""
        with self._lock:
            for name in self._growing:
                self._send_new(name, whole_lines=True)
            self._replace(PROFILES, "*.xplane.pb")
            if self._host == 0 and self._clock() - self._replaced >= REPLACE_INTERVAL_S:
                self._replace("tensorboard")
                self._replaced = self._clock()

    def finish(self) -> None:
        """All that the process left, after its end. Raises PodlaunchError as `send` does."""
        self._times.look()
        with self._lock:
            for name in self._growing:
                self._send_new(name, whole_lines=False)
            self._replace(PROFILES, "*.xplane.pb")
            if self._host == 0:
                self._replace("tensorboard")
                self._replace("export")
                shutil.rmtree(self.folder / "export", ignore_errors=True)  # as large as the model, and nobody looks for it here

    def _send_new(self, name: str, *, whole_lines: bool) -> None:
        path = self.folder / name
        if not path.exists():
            return
        done = self._sent.get(name, 0)
        with path.open("rb") as file:
            file.seek(done)
            new = file.read()
        if whole_lines:
            new = new[: new.rfind(b"\n") + 1]
        if new:
            self.files.append(name, new)
            self._sent[name] = done + len(new)

    def _replace(self, folder: str, pattern: str = "*") -> None:
        for path in sorted((self.folder / folder).rglob(pattern)):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and (size := path.stat().st_size) != self._sent.get(name):
                self.files.upload(name, path)
                self._sent[name] = size


class Shared:
    """A run directory on a file system that the host sees: the training process uses it as it is."""

    def __init__(self, run: RunDirectory, host: int) -> None:
        self._run, self.files, self._host, self.folder, self.checkpoints = run, run.files, host, run.path, run.checkpoints
        self._times = LogTimes()

    def fetch(self, attempt: int) -> bytes:
        self._times = LogTimes(self.folder / self._run.log_name(attempt, self._host))
        return self._run.read_code()

    def keep_sending(self, ended: threading.Event) -> None:
        """Nothing is to be sent; the times of the log are noted."""
        while not ended.wait(INTERVAL_S):
            self._times.look()

    def finish(self) -> None:
        self._times.look()


def open_place(url: str, host: int, cache: Path) -> Place:
    """Where training process `host` of the run at `url`, a local path or gs://, reads and writes. `cache`: of this machine."""
    run = RunDirectory(url)
    if isinstance(run.files, ObjectFiles):
        return Mirror(run, run.files, cache / "runs" / run.run_id / str(host), host, cache)
    return Shared(run, host)
