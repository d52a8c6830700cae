"""What the launcher costs while a run trains: its steps per second beside those of a bare loop, and how long checkpoints hold it up.

    python benchmarks/overhead.py [--rounds 3] [--steps 150] [override ...]

Both train the default model on the default data, two processes of four CPU devices. The bare loop (gang/bare_loop.py) is the same compiled
step, waited for each time, in two plain processes: no events, no metrics, no supervisor, no spares. Rounds alternate, on the same machine
with the same idle cluster beside them; the runs save no checkpoint, so that only the loop is compared. A last run saves at the default
interval, and tells for how long training stood still. Each is measured in two ways:

    apart     the training processes have the first core, everything else the others: a TPU host computes on its chips and has processors to
              spare, so this is what the launcher does to a training loop. `speed_ratio`, which has the target.
    together  nobody is bound to a core, and the loop would fill them all: what Ray and the launcher compute themselves is missing there.
              `shared_ratio`.

The last line is JSON. Exit code 1 when a target is missed.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import (
    GANG,
    HOSTS,
    Failed,
    Home,
    Lines,
    last_line,
    local_cluster,
    machine,
    median,
    ratio,
    run_benchmark,
    table,
    wait_for,
)

SPEED_TARGET, BLOCKING_TARGET = 0.98, 0.01
CHIPS_PER_HOST = 4
WARM = 20
"""Steps before the clock starts."""
LIMIT_S = 900.0
NEVER = 10**6
LOG_EVERY = 5
APART, TOGETHER = "apart", "together"


def bind(pid: int, cores: set[int]) -> None:
    """All threads of a process, and what they start from now on."""
    with suppress(OSError):  # it has ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(thread), cores)


@contextmanager
def placed(home: Home, way: str, training: Sequence[int]) -> Iterator[None]:
    """While the block lasts these processes and all others of the cluster have cores of their own, when `way` is APART."""
    cores = os.sched_getaffinity(0)
    first, others = {min(cores)}, cores - {min(cores)}
    if way == APART:
        for process in home.processes():
            bind(process.pid, first if process.pid in training else others)
    try:
        yield
    finally:
        if way == APART:
            for process in home.processes():
                bind(process.pid, cores)


def bare(home: Home, way: str, steps: int, overrides: Sequence[str]) -> float:
    """Steps per second."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = home.env | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={CHIPS_PER_HOST}",
        "PODLAUNCH_COMPILATION_CACHE": str(home.base / "cache" / "compilation"),
        "PODLAUNCH_COORDINATOR": f"127.0.0.1:{port}",
        "PODLAUNCH_NUM_PROCESSES": str(HOSTS),
    }
    command = [sys.executable, str(GANG / "bare_loop.py"), str(steps), str(WARM), *overrides]
    processes = []
    for index in range(HOSTS):
        with (home.base / f"bare-{index}.log").open("w") as log:
            own = env | {"PODLAUNCH_PROCESS_ID": str(index)}
            processes.append(subprocess.Popen(command, env=own, cwd=home.work, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
    told = home.base / "bare-0.log"
    try:
        wait_for(lambda: "step 1" in told.read_text(), "the first step of the bare loop", LIMIT_S)
        with placed(home, way, [process.pid for process in processes]):
            codes = [process.wait(LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = told.read_text().splitlines()
    if any(codes):
        raise Failed(f"the bare loop ended with {codes}: {said[-1] if said else ''}")
    return float(json.loads(said[-1])["steps_per_second"])


def launched(home: Home, way: str, run: str, steps: int, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The run's rows of metrics and events, once it is done."""
    process = home.launch(f"run.name={run}", f"trainer.steps={steps}", *overrides)
    folder = home.work / "runs" / run
    metrics, events = Lines(folder / "metrics.jsonl"), Lines(folder / "events.jsonl")
    wait_for(lambda: process.poll() is not None or any("loss" in row for row in metrics.all()), f"the first step of {run}", LIMIT_S)
    with placed(home, way, [pid for event in events.all() if event["event"] == "processes" for pid in event["pids"]]):
        wait_for(lambda: process.poll() is not None, f"the end of {run}", LIMIT_S, pause=0.2)
    if process.returncode != 0:
        raise Failed(f"{run} ended with {process.returncode}: {home.output()}")
    return metrics.all() + events.all()


def steps_per_second(rows: Sequence[Mapping[str, Any]], warm: int) -> float:
    """From the first logged step at or after `warm` to the last."""
    logged = sorted({row["step"]: row["time"] for row in rows if "event" not in row and "loss" in row and row["step"] >= warm}.items())
    (first, began), (last, ended) = logged[0], logged[-1]
    return float((last - first) / (ended - began))


def blocking_share(rows: Sequence[Mapping[str, Any]], steps: int) -> float:
    """For how much of the time of its steps training stood still for a checkpoint; the last one comes after them."""
    logged = [row["time"] for row in rows if "event" not in row and "loss" in row]
    blocked = sum(row["blocking_s"] for row in rows if row.get("event") == "checkpoint" and row["step"] < steps)
    return float(blocked / (max(logged) - min(logged)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--keep", action="store_true", help="leave the folder with runs and logs")
    arguments = parser.parse_args()
    steps, overrides = arguments.steps, [*arguments.overrides, f"trainer.log_every={LOG_EVERY}"]
    if len(os.sched_getaffinity(0)) < 2:
        raise Failed("needs two cores: one for training, one for the launcher")
    unsaved = [*overrides, f"trainer.checkpoint_every={NEVER}"]
    rates: dict[str, dict[str, list[float]]] = {way: {"launched": [], "bare": []} for way in (APART, TOGETHER)}
    blocked = {}
    with local_cluster(keep=arguments.keep) as home:
        for number in range(arguments.rounds):
            for way, found in rates.items():
                for name in sorted(found, reverse=bool(number % 2)):
                    if name == "bare":
                        rate = bare(home, way, steps, overrides)
                    else:
                        rate = steps_per_second(launched(home, way, f"{way}-{number}", steps, unsaved), WARM)
                    found[name].append(rate)
                    print(f"round {number + 1}, {way}, {name}: {rate:.3f} steps/s, load {os.getloadavg()[0]:.1f}", flush=True)
        for way in rates:
            blocked[way] = blocking_share(launched(home, way, f"{way}-saving", steps, overrides), steps)
    ratios = {way: ratio(median(found["launched"]), median(found["bare"])) for way, found in rates.items()}
    rows = [[f"{way}, {name}", median(values)] for way, found in rates.items() for name, values in found.items()]
    print(table(["median", "steps/s"], rows))
    for way, share in blocked.items():
        print(f"{way}: checkpoints at the default interval held training up for {share:.2%} of its time (target {BLOCKING_TARGET:.0%})")
    speed = ratios[APART]
    result = {
        "benchmark": "overhead",
        "speed_ratio": speed,
        "shared_ratio": ratios[TOGETHER],
        "blocking_share": blocked[APART],
        "shared_blocking_share": blocked[TOGETHER],
        "targets": {"speed_ratio": SPEED_TARGET, "blocking_share": BLOCKING_TARGET},
        "raw": rates,
        "steps": steps,
        "machine": machine(),
    }
    print(last_line(result))
    return 0 if speed is not None and speed >= SPEED_TARGET and max(blocked.values()) < BLOCKING_TARGET else 1


if __name__ == "__main__":
    run_benchmark(main)
