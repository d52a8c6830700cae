"""Who may write a run: one claim an attempt, made by creating a file that must not exist yet.

    <run>/claims/<attempt>.json      {attempt, holder, time}

The newest claim holds the run. Whoever finds a newer one than its own has been replaced: it writes and publishes nothing any more. A claim
appears whole or not at all, and exactly one of several claimants of an attempt gets it (on gs:// by `if_generation_match=0`).
"""

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from cluster.errors import PodlaunchError
from launcher.run_files import RunFiles

_FOLDER = "claims"
_NAME = re.compile(r"(\d+)\.json")


class Superseded(PodlaunchError):
    """Another attempt has taken the run over."""


@dataclass(frozen=True)
class Claim:
    attempt: int
    holder: str
    """The job whose attempt it is."""
    time: float
    """Seconds since the epoch."""


class Claims:
    """The claims of one run. Methods raise OSError or CloudError when its place does not answer."""

    def __init__(self, files: RunFiles, clock: Callable[[], float] = time.time) -> None:
        self._files, self._clock = files, clock

    def claim(self, attempt: int, holder: str) -> bool:
        """Whether the attempt is `holder`'s now: nobody had claimed it, nor a later one."""
        newest = self.newest()
        if newest is not None and newest.attempt >= attempt:
            return False
        return self._files.create(f"{_FOLDER}/{attempt}.json", json.dumps(asdict(Claim(attempt, holder, self._clock()))).encode())

    def newest(self) -> Claim | None:
        attempts = [int(name[1]) for file in self._files.list(_FOLDER) if (name := _NAME.fullmatch(file)) is not None]
        content = self._files.read(f"{_FOLDER}/{max(attempts)}.json") if attempts else None
        return None if content is None else Claim(**json.loads(content))

    def holds(self, holder: str) -> bool:
        """Whether the newest claim is `holder`'s."""
        newest = self.newest()
        return newest is not None and newest.holder == holder

    def check(self, attempt: int) -> None:
        """Raises Superseded when a later attempt than this one is claimed.

        Attempts are claimed one after the other, so that to look for the next one does. It is asked before every writing, and on Cloud
        Storage a listing costs more than ten times what reading does.
        """
        if self._files.read(f"{_FOLDER}/{attempt + 1}.json") is None:
            return
        newest = self.newest()
        if newest is not None:
            raise Superseded(f"attempt {newest.attempt} ({newest.holder}) has taken the run over from attempt {attempt}")
