"""Many faults in one run: does anything pile up?

    python benchmarks/soak.py [--faults 200]

A run of short steps (gang/train.py) on the local cluster; once it has come further than ever, has a newer checkpoint and a spare on each
host, one of its training processes is killed, the first and the second in turn. Before each fault the cluster is looked at:

    MB, fds, threads         resident memory, open file descriptors and threads of the run's supervisor, and of the largest runner
    processes                of the whole cluster
    groups                   placement groups that hold or want resources
    files                    in the state, the cache and the temporary folders, and what the run directory should not hold

All of them have to be flat: the median of the last fifth may exceed that of the second fifth (the first still warms up) by no more than
the slack that SLACK grants. After the run nothing of it may be left. The last line is JSON with a verdict. Exit code 1 when something
leaks.
"""

import argparse
import os
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from benchmarks.measure import (
    GANG,
    HOSTS,
    Failed,
    Home,
    Told,
    first_new_step,
    last_line,
    local_cluster,
    machine,
    run_benchmark,
    table,
    variable,
    wait_for,
)

RUN = "soak"
EVERY, PAUSE_S, STEPS = 20, 0.02, 10**8
LIMIT_S = 240.0
COLUMNS = ("sup MB", "sup fds", "sup threads", "run MB", "run fds", "run threads", "processes", "groups", "files")
SLACK = {
    "sup MB": 8.0,
    "sup fds": 2.0,
    "sup threads": 2.0,
    "run MB": 8.0,
    "run fds": 2.0,
    "run threads": 2.0,
    "processes": 1.0,  # a shell or an agent's short-lived helper may be caught
    "groups": 0.0,
    "files": 10.0,
}
_KEPT = ("logs/", "claims/", "checkpoints/", "work/", "tensorboard/")
"""Folders of a run directory that grow with its attempts, or that the program itself fills."""
_KEPT_FILES = ("config.yaml", "code.zip", "status.json", "events.jsonl", "metrics.jsonl")


def look(home: Home) -> dict[str, float]:
    """One row of COLUMNS."""
    found: dict[str, list[dict[str, float]]] = {"supervisor": [], "runner": []}
    processes = home.processes()
    for process in processes:
        try:
            words = " ".join(process.cmdline())
            kind = "supervisor" if "-m launcher.gang.supervisor" in words else "runner" if words.startswith("ray::Runner") else None
            if kind is not None:
                mb = process.memory_info().rss / 2**20
                found[kind].append({"MB": mb, "fds": process.num_fds(), "threads": process.num_threads()})
        except psutil.NoSuchProcess:
            continue
    if len(found["supervisor"]) != 1 or len(found["runner"]) != HOSTS:
        raise Failed(f"{len(found['supervisor'])} supervisors and {len(found['runner'])} runners, not 1 and {HOSTS}")
    rows = {"sup": found["supervisor"][0], "run": max(found["runner"], key=lambda row: row["MB"])}
    row = {f"{who} {what}": value for who, values in rows.items() for what, value in values.items()}
    return row | {"processes": len(processes), "groups": home.placement_groups(), "files": len(files(home, processes))}


def files(home: Home, processes: Sequence[psutil.Process]) -> list[Path]:
    """What should not become more."""
    run = home.work / "runs" / RUN
    sessions = {word.partition("=")[2] for process in processes for word in _words(process) if word.startswith("--temp-dir=")}
    temporary = {place for process in processes if (place := variable(process, "TMPDIR")) is not None}
    places = [home.base / "state", home.base / "cache", *map(Path, sorted(sessions | temporary))]
    found = {path for place in places for path in place.rglob("*") if path.is_file()}
    unexpected = {path for path in run.rglob("*") if path.is_file() and not _is_kept(path.relative_to(run).as_posix())}
    return sorted(found | unexpected)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def _is_kept(name: str) -> bool:
    return name in _KEPT_FILES or name.startswith(_KEPT)


def growth(values: Sequence[float]) -> float:
    """The median of the last fifth less that of the second; 0 when there are not five to take it of."""
    fifth = len(values) // 5
    return statistics.median(values[-fifth:]) - statistics.median(values[fifth : 2 * fifth]) if fifth else 0.0


def verdict(rows: Sequence[Mapping[str, float]], left: Mapping[str, int]) -> dict[str, Any]:
    """`left`: what is left after the run's end, by name."""
    grown = {column: growth([row[column] for row in rows]) for column in COLUMNS}
    leaks = [column for column, value in grown.items() if value > SLACK[column]] + [
        f"left: {name}" for name, count in left.items() if count
    ]
    return {"flat": not leaks, "leaks": leaks, "growth": grown, "slack": SLACK, "left": dict(left)}


def strike(home: Home, told: Told, index: int) -> float:
    """Kill process `index`; the seconds until a new step."""
    old = told.pids()
    os.kill(told.pid(index), signal.SIGKILL)
    killed = time.time()
    wait_for(lambda: first_new_step(told.steps(), old) is not None, f"a new step after fault {index}; {home.output()}", LIMIT_S)
    again = first_new_step(told.steps(), old)
    assert again is not None
    return again - killed


def children(home: Home) -> int:
    """Training processes and spares."""
    return sum("launcher.training.child" in " ".join(_words(process)) for process in home.processes())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no further fault after so many")
    parser.add_argument("--keep", action="store_true", help="leave the folder with runs and logs")
    arguments = parser.parse_args()
    rows: list[dict[str, float]] = []
    recoveries: list[float] = []
    with local_cluster(keep=arguments.keep) as home:
        place = home.base / "place"
        place.mkdir()
        entrypoint = f"train.py {place} --steps={STEPS} --every={EVERY} --pause={PAUSE_S}"
        settings = ("run.budget.infrastructure=null", f"run.name={RUN}", f"run.code={GANG}")
        process = home.launch("job=script", f"job.entrypoint={entrypoint}", *settings)
        told, began = Told(place), time.monotonic()
        for fault in range(1, arguments.faults + 1):
            if time.monotonic() - began > 60 * arguments.minutes:
                break
            checkpoint = max((int(path.name) for path in (place / "checkpoints").glob("*") if path.name.isdigit()), default=0)
            wait_for(lambda: told.newest() > checkpoint + EVERY, f"steps before fault {fault}", LIMIT_S)  # noqa: B023  # waited for here
            wait_for(lambda: children(home) == 2 * HOSTS, f"spares before fault {fault}", LIMIT_S, pause=0.5)
            if process.poll() is not None:
                raise Failed(f"the run ended before fault {fault}: {home.output()}")
            rows.append(look(home))
            recoveries.append(strike(home, told, fault % HOSTS))
            if fault == 1 or fault % 10 == 0:
                numbers = "  ".join(f"{column} {rows[-1][column]:.0f}" for column in COLUMNS)
                minutes = (time.monotonic() - began) / 60
                print(f"fault {fault:>4} after {minutes:5.1f} min: recovered in {recoveries[-1]:.2f} s; {numbers}", flush=True)
        left = ended(home, told)
    result = verdict(rows, left)
    print(table(["", *COLUMNS], [["first", *rows[0].values()], ["last", *rows[-1].values()]]))
    print(
        last_line(
            {
                "benchmark": "soak",
                "faults": len(recoveries),
                **result,
                "recovery_median_s": statistics.median(recoveries),
                "recovery_max_s": max(recoveries),
                "rows": rows,
                "recoveries_s": recoveries,
                "machine": machine(),
            }
        )
    )
    return 0 if result["flat"] else 1


def ended(home: Home, told: Told) -> dict[str, int]:
    """Stop the run; what is left of it."""
    home.tpu("train", "stop", RUN, "--now")

    def left() -> dict[str, int]:
        runners = sum(" ".join(_words(process)).startswith("ray::Runner") for process in home.processes())
        trained = sum(psutil.pid_exists(pid) for pid in told.pids())
        return {"processes": children(home) + runners + trained, "placement groups": home.placement_groups()}

    deadline = time.monotonic() + 60
    while any((found := left()).values()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


if __name__ == "__main__":
    run_benchmark(main)
