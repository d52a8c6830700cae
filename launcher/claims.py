"""Who may write a run: one claim an attempt, made by creating a file that must not exist yet.

    <run>/claims/<attempt>.json      {attempt, holder, time}

The newest claim holds the run. Whoever finds a newer one than its own has been replaced: it writes and publishes nothing any more. A claim
appears whole or not at all, and exactly one of several claimants of an attempt gets it (on gs:// the same is `if_generation_match=0`).
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.errors import PodlaunchError
from cluster.state import read_json


class Superseded(PodlaunchError):
    """Another attempt has taken the run over."""


@dataclass(frozen=True)
class Claim:
    attempt: int
    holder: str
    """The job whose attempt it is, or what ended the run in its place."""
    time: float
    """Seconds since the epoch."""


class Claims:
    """The claims of one run."""

    def __init__(self, run: Path, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._clock = run / "claims", clock

    def claim(self, attempt: int, holder: str) -> bool:
        """Whether the attempt is `holder`'s now: nobody had claimed it, nor a later one."""
        newest = self.newest()
        if newest is not None and newest.attempt >= attempt:
            return False
        self._folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self._folder, prefix=".")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(asdict(Claim(attempt, holder, self._clock())), file)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            os.link(name, self._path(attempt))  # unlike a rename, refused where the claim exists
        except FileExistsError:
            return False
        finally:
            Path(name).unlink()
        return True

    def newest(self) -> Claim | None:
        attempts = [int(path.stem) for path in self._folder.glob("[0-9]*.json")]
        values = read_json(self._path(max(attempts))) if attempts else None
        return None if values is None else Claim(int(values["attempt"]), str(values["holder"]), float(values["time"]))

    def holds(self, holder: str) -> bool:
        """Whether the newest claim is `holder`'s."""
        newest = self.newest()
        return newest is not None and newest.holder == holder

    def check(self, attempt: int) -> None:
        """Raises Superseded when a later attempt than this one is claimed."""
        newest = self.newest()
        if newest is not None and newest.attempt > attempt:
            raise Superseded(f"attempt {newest.attempt} ({newest.holder}) has taken the run over from attempt {attempt}")

    def _path(self, attempt: int) -> Path:
        return self._folder / f"{attempt}.json"
