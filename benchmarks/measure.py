"""What the benchmarks share: a user's home of their own with a local cluster in it, bounded waits, figures, and the last line."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from cluster.ray_http import RayHttp

ROOT = Path(__file__).resolve().parents[1]
GANG = ROOT / "benchmarks" / "gang"
HOSTS, TOPOLOGY, ACCELERATOR = 2, "2x2x2", "TPU-V4"
"""Of the local cluster: an emulated v4-16."""
STOP_LIMIT_S = 120.0


class Failed(Exception):
    """A benchmark cannot go on; the message is one line."""


@dataclass(frozen=True)
class Home:
    """A folder that holds everything that a benchmark makes: state, cache, runs."""

    base: Path

    @property
    def work(self) -> Path:
        return self.base / "work"

    @property
    def places(self) -> dict[str, str]:
        return {"PODLAUNCH_STATE_DIR": str(self.base / "state"), "PODLAUNCH_CACHE_DIR": str(self.base / "cache")}

    @property
    def env(self) -> dict[str, str]:
        return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | self.places | {"NO_COLOR": "1"}

    @property
    def http(self) -> "RayHttp":
        """The dashboard of the cluster's head."""
        from cluster.clusters import find

        cluster = find("local")
        assert cluster is not None
        return cluster.http

    def placement_groups(self) -> int:
        """How many there are on the cluster that hold or want resources."""
        rows = self.http.get("/api/v0/placement_groups?limit=10000")["data"]["result"]["result"]
        return sum(row["state"] != "REMOVED" for row in rows)

    def start(self, *command: str) -> "subprocess.Popen[str]":
        """Its output goes to a file, so that nobody has to read it."""
        number = len(list(self.base.glob("output-*.log")))
        with (self.base / f"output-{number}.log").open("w") as output:
            # In a session of its own: Ctrl-C ends the benchmark, and that ends these in order.
            return subprocess.Popen(
                command,
                cwd=self.work,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                text=True,
                start_new_session=True,
            )

    def output(self) -> str:
        """The newest command's last lines."""
        newest = max(self.base.glob("output-*.log"), key=lambda path: int(path.stem.partition("-")[2]))
        return " | ".join(newest.read_text().splitlines()[-3:])

    def launch(self, *overrides: str) -> "subprocess.Popen[str]":
        return self.start(sys.executable, str(ROOT / "launch.py"), *overrides)

    def tpu(self, *arguments: str, limit: float = 300.0) -> str:
        """Raises Failed with the command's last line."""
        done = subprocess.run(
            [str(Path(sys.executable).parent / "tpu"), *arguments],
            cwd=self.work,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
        if done.returncode != 0:
            said = (done.stderr or done.stdout).splitlines()
            raise Failed(f"tpu {' '.join(arguments)}: {said[-1] if said else f'exit code {done.returncode}'}")
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """All that descends from our daemons carries the state directory in its environment."""
        mine = str(self.base / "state")
        return [
            process for process in psutil.process_iter() if process.pid != os.getpid() and variable(process, "PODLAUNCH_STATE_DIR") == mine
        ]


def variable(process: psutil.Process, name: str) -> str | None:
    with suppress(psutil.Error):
        return process.environ().get(name)
    return None


@contextmanager
def local_cluster(*, keep: bool = False) -> Iterator[Home]:
    """A local cluster with its slice up; ended with all that runs on it, whatever happens, also at Ctrl-C and SIGTERM.

    `keep`: leave its folder, with runs and logs, for a look.
    """
    home = Home(Path(tempfile.mkdtemp(prefix="podlaunch-bench-")))
    home.work.mkdir()
    os.environ.update(home.places)
    try:
        home.tpu("start", "--slices", "1")
        yield home
    finally:
        end(home)
        if keep:
            print(f"kept: {home.base}", file=sys.stderr)
        else:
            shutil.rmtree(home.base, ignore_errors=True)


def end(home: Home) -> None:
    """Stop the cluster; what does not end by itself is killed, and said."""
    try:
        home.tpu("stop", "-y", limit=STOP_LIMIT_S)
    except (Failed, subprocess.TimeoutExpired) as error:
        print(f"tpu stop did not end the cluster: {error}", file=sys.stderr)
    left = home.processes()
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    if left:
        print(f"{len(left)} processes were left and are killed", file=sys.stderr)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run_benchmark(main: Callable[[], int]) -> None:
    """Exits with what `main` returns; 1 with one line for what a user can do something about, 130 for Ctrl-C and SIGTERM."""
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        code = main()
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def wait_for(condition: Callable[[], bool], what: str, limit: float, *, pause: float = 0.02) -> None:
    """Wait for another process's doing, which tells nobody. Raises Failed after `limit` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"not within {limit:.0f} s: {what}")
        time.sleep(pause)


class Lines:
    """The objects of a .jsonl file that grows, each read once."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0
        self._found: list[dict[str, Any]] = []

    def all(self) -> list[dict[str, Any]]:
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._read)
                new = file.read()
            new = new[: new.rfind(b"\n") + 1]  # the last line may still be being written
            self._read += len(new)
            self._found += [json.loads(line) for line in new.splitlines()]
        return self._found


class Told:
    """What gang/train.py has told in one folder."""

    def __init__(self, place: Path) -> None:
        self._processes, self._steps = Lines(place / "processes.jsonl"), Lines(place / "steps.jsonl")

    def steps(self) -> list[dict[str, Any]]:
        return self._steps.all()

    def newest(self) -> int:
        steps = self.steps()
        return int(steps[-1]["step"]) if steps else 0

    def pids(self) -> frozenset[int]:
        """Of all attempts."""
        return frozenset(process["pid"] for process in self._processes.all())

    def pid(self, index: int) -> int:
        """Of process `index` of the newest attempt."""
        return int(next(process["pid"] for process in reversed(self._processes.all()) if process["process"] == index))


def first_new_step(steps: Sequence[Mapping[str, Any]], old: frozenset[int]) -> float | None:
    """When a process that is none of `old` (pids) did a step that none of those had done; None while there is none."""
    highest = max((step["step"] for step in steps if step["pid"] in old), default=0)
    return next((float(step["time"]) for step in steps if step["pid"] not in old and step["step"] > highest), None)


def median(values: Sequence[float | None]) -> float | None:
    """Of those that there are."""
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def ratio(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or not theirs else round(ours / theirs, 4)


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The first column to the left, the others to the right."""
    cells = [list(titles), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(titles))]
    lines = [
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width) for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def last_line(result: Mapping[str, Any]) -> str:
    """JSON of one line. Floats are rounded to what was measured."""
    return json.dumps(_rounded(result))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    return {"cores": os.cpu_count(), "load": list(os.getloadavg()), "time": time.strftime("%Y-%m-%d %H:%M:%S")}
