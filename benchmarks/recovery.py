"""How fast a gang starts, and goes on after one of its processes is killed: podlaunch beside Ray Train's JaxTrainer, on one cluster.

    pip install -c requirements.lock -e . "ray[train]>=2.60,<2.61"     # once, in a virtual environment of its own
    python benchmarks/recovery.py [--rounds 5]

The cluster is the local one: an emulated v4-16, two hosts of four CPU devices, up before anything is measured. All train the same function
(gang/train.py: a jitted step over all eight devices with an all-reduce) and restore the same 50 MB with Orbax. Each round takes every
alternative once, in turn; the process that is killed is the second in even rounds and the first in odd ones.

    launch     from the call to the end of the first step. podlaunch: from the moment that the run is submitted to the running cluster, so
               with the start of the Ray job and its supervisor. JaxTrainer: from the call of fit(), in a driver that has started and has
               imported everything, so WITHOUT the start of its job. `command` is the whole: from `python launch.py`, and from the
               submission of the Ray job whose driver calls fit(). `submission_ratio` compares like with like: both from the submission
               of the Ray job.
    recovery   from SIGKILL to the end of the first step that had not been done before, which repeats the steps since the last checkpoint.

    podlaunch               as it is: a spare process a host while a run trains, a warm one between runs
    podlaunch, no spares    run.spares=false
    JaxTrainer              as it is
    JaxTrainer, tuned       its timeouts cut, its health checks more frequent, and JAX's persistent compilation cache, which podlaunch sets

The last line is JSON. Each ratio is podlaunch's median by that of the better JaxTrainer. Exit code 1 when a target is missed.
"""

import argparse
import importlib.util
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from benchmarks.measure import (
    ACCELERATOR,
    GANG,
    HOSTS,
    ROOT,
    TOPOLOGY,
    Failed,
    Home,
    Told,
    first_new_step,
    last_line,
    local_cluster,
    machine,
    median,
    ratio,
    run_benchmark,
    table,
    wait_for,
)

LAUNCH_TARGET, RECOVERY_TARGET = 0.35, 0.1
LIMIT_S = 240.0
"""For one launch, and for one recovery; what takes longer is written down as null."""
SETTLE_S = 20.0
"""From the first step to the kill: the same for all. Spares are ready by then."""
REST_S = 16.0
"""Before each launch, the same for all: what the one before has left on the cluster comes to rest. On podlaunch's hosts a process is warmed
for the next run meanwhile (launcher/gang/nursery.py); it idles while others are measured."""
EVERY, PAUSE_S, STEPS = 40, 0.05, 1_000_000
KILL_AFTER = 1
"""So many steps after a checkpoint, or a few more."""
NEEDED = ("pandas", "pyarrow", "pydantic", "fsspec", "tensorboardX")
"""By ray.train, on the hosts too: they run this interpreter."""
TUNED = {
    "JAX_DISTRIBUTED_SHUTDOWN_TIMEOUT_S": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
"""Environment of the driver, the controller and the workers."""


@dataclass
class Sample:
    """Seconds; None for what did not happen within the limit."""

    launch: float | None = None
    command: float | None = None
    recovery: float | None = None
    load: float = field(default_factory=lambda: os.getloadavg()[0])
    error: str | None = None


class Contender(Protocol):
    """One alternative. `run` names one go, which is started once and ended once."""

    name: str

    def start(self, run: str, place: Path) -> None: ...

    def called(self, run: str, place: Path) -> float | None:
        """When the call was made that `launch` counts from, seconds since the epoch."""

    def ended(self, run: str) -> str | None:
        """What it said when it has ended by itself, which it should not."""

    def stop(self, run: str) -> None:
        """Returns when nothing of it is left on the cluster."""


class Podlaunch:
    def __init__(self, home: Home, name: str, *overrides: str) -> None:
        self.name, self._home, self._overrides = name, home, overrides

    def start(self, run: str, place: Path) -> None:
        entrypoint = shlex.join(["train.py", str(place), f"--steps={STEPS}", f"--every={EVERY}", f"--pause={PAUSE_S}"])
        job = ("job=script", f"run.code={GANG}", f"job.entrypoint={entrypoint}", f"run.name={run}")
        self._process = self._home.launch(*job, *self._overrides)

    def called(self, run: str, place: Path) -> float | None:  # noqa: ARG002  # as the others
        from launcher.runs import RunDirectory

        status = RunDirectory(self._home.work / "runs" / run).status()
        return None if status is None else status.started_at

    def ended(self, run: str) -> str | None:  # noqa: ARG002
        return None if self._process.poll() is None else self._home.output()

    def stop(self, run: str) -> None:
        if self._process.poll() is None:
            self._home.tpu("train", "stop", run, "--now")
            self._process.wait(60)


class JaxTrainer:
    def __init__(self, home: Home, name: str, environment: dict[str, str], cache: Path | None) -> None:
        self.name, self._environment, self._cache = name, environment, cache
        self._http = home.http

    def start(self, run: str, place: Path) -> None:
        driver = str(ROOT / "benchmarks" / "peers" / "jax_trainer.py")
        shape = [f"--hosts={HOSTS}", f"--topology={TOPOLOGY}", f"--accelerator={ACCELERATOR}"]
        work = [str(place), f"--steps={STEPS}", f"--every={EVERY}", f"--pause={PAUSE_S}"]
        cache = [] if self._cache is None else [f"--cache={self._cache}"]
        entrypoint = f'exec "$PODLAUNCH_PYTHON" {shlex.join([driver, *work, *shape, *cache])}'
        environment = {"RAY_TRAIN_V2_ENABLED": "1", **self._environment}
        job = {"entrypoint": entrypoint, "submission_id": run, "runtime_env": {"env_vars": environment}}
        self._http.post("/api/jobs/", job)

    def called(self, run: str, place: Path) -> float | None:  # noqa: ARG002
        driver = place / "driver.json"
        return float(json.loads(driver.read_text())["fit"]) if driver.exists() else None

    def ended(self, run: str) -> str | None:
        job = self._http.get(f"/api/jobs/{run}")
        return " ".join(str(job.get("message")).split())[-300:] if job["status"] in ("FAILED", "SUCCEEDED", "STOPPED") else None

    def stop(self, run: str) -> None:
        if self.ended(run) is None:
            self._http.post(f"/api/jobs/{run}/stop", {})
            wait_for(lambda: self.ended(run) is not None, f"the end of job {run}", 60, pause=0.5)


def measure(home: Home, contender: Contender, run: str, victim: int) -> Sample:
    """One launch and one recovery. `victim`: the index of the process that is killed."""
    place = home.base / "places" / run
    place.mkdir(parents=True)
    time.sleep(REST_S)
    told, sample = Told(place), Sample()
    commanded = time.time()
    contender.start(run, place)
    try:
        _until(contender, run, lambda: bool(told.steps()), "the first step")
        called = contender.called(run, place)
        assert called is not None, "a step without a call"
        first = told.steps()[0]["time"]
        sample.launch, sample.command = first - called, first - commanded
        ready = first + SETTLE_S
        _until(
            contender,
            run,
            lambda: time.time() >= ready and told.newest() > EVERY and _is_soon_after_a_checkpoint(told.newest()),
            "the kill",
        )
        old = told.pids()
        os.kill(told.pid(victim), signal.SIGKILL)
        killed = time.time()
        _until(contender, run, lambda: first_new_step(told.steps(), old) is not None, "a new step after the kill")
        again = first_new_step(told.steps(), old)
        assert again is not None
        sample.recovery = again - killed
    except Failed as error:
        sample.error = str(error)
        print(f"{contender.name}: {error}", file=sys.stderr)
    finally:
        contender.stop(run)
        wait_for(lambda: not any(psutil.pid_exists(pid) for pid in told.pids()), f"the end of the processes of {run}", 60)
        wait_for(lambda: home.placement_groups() == 0, f"the release of what {run} held", 60, pause=0.5)
    return sample


def _is_soon_after_a_checkpoint(step: int) -> bool:
    return KILL_AFTER <= step % EVERY <= KILL_AFTER + 2


def _until(contender: Contender, run: str, condition: Any, what: str) -> None:
    looked = time.monotonic()

    def done() -> bool:
        nonlocal looked
        if condition():
            return True
        if time.monotonic() - looked > 2.0:
            looked = time.monotonic()
            if (said := contender.ended(run)) is not None:
                raise Failed(f"{run} ended before {what}: {said}")
        return False

    wait_for(done, f"{what} of {run}", LIMIT_S)


def report(samples: dict[str, list[Sample]], ours: str, theirs: Sequence[str]) -> dict[str, Any]:
    """The result, and the table before it on stdout. Each ratio is by the better of `theirs`."""
    medians = {
        name: {what: median([getattr(sample, what) for sample in taken]) for what in ("launch", "command", "recovery")}
        for name, taken in samples.items()
    }
    rows = [[name, *values.values(), len(samples[name])] for name, values in medians.items()]
    print(table(["median, s", "launch", "command", "recovery", "rounds"], rows))
    ratios = {what: ratio(medians[ours][what], _least(medians, theirs, what)) for what in ("launch", "recovery")}
    return {
        "benchmark": "recovery",
        "launch_ratio": ratios["launch"],
        "recovery_ratio": ratios["recovery"],
        "submission_ratio": ratio(medians[ours]["launch"], _least(medians, theirs, "command")),
        "targets": {"launch_ratio": LAUNCH_TARGET, "recovery_ratio": RECOVERY_TARGET},
        "medians_s": medians,
        "raw": {name: [vars(sample) for sample in taken] for name, taken in samples.items()},
        "machine": machine(),
    }


def _least(medians: dict[str, dict[str, float | None]], names: Sequence[str], what: str) -> float | None:
    there = [value for name in names if (value := medians[name][what]) is not None]
    return min(there, default=None)


def met(result: dict[str, Any]) -> bool:
    return all(result[name] is not None and result[name] <= most for name, most in result["targets"].items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so many")
    parser.add_argument("--only", action="append", help="an alternative by its name; may be given several times")
    parser.add_argument("--keep", action="store_true", help="leave the folder with runs and logs")
    arguments = parser.parse_args()
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise Failed(f'Ray Train needs {", ".join(missing)} here: pip install -c requirements.lock -e . "ray[train]>=2.60,<2.61"')
    with local_cluster(keep=arguments.keep) as home:
        contenders: list[Contender] = [
            Podlaunch(home, "podlaunch"),
            Podlaunch(home, "podlaunch, no spares", "run.spares=false"),
            JaxTrainer(home, "JaxTrainer", {}, None),
            JaxTrainer(home, "JaxTrainer, tuned", TUNED, home.base / "xla"),
        ]
        names = [contender.name for contender in contenders]
        chosen = [contender for contender in contenders if not arguments.only or contender.name in arguments.only]
        samples: dict[str, list[Sample]] = {name: [] for name in names}
        end = time.monotonic() + 60 * arguments.minutes
        for number in range(arguments.rounds):
            order = chosen[number % len(chosen) :] + chosen[: number % len(chosen)]
            for contender in order:
                if time.monotonic() >= end:
                    break
                run = f"r{number}-{names.index(contender.name)}"
                sample = measure(home, contender, run, victim=(number + 1) % HOSTS)
                samples[contender.name].append(sample)
                print(f"round {number + 1}, {contender.name}: {vars(sample)}", flush=True)
        result = report(samples, names[0], names[2:])
    print(last_line(result))
    return 0 if met(result) else 1


if __name__ == "__main__":
    run_benchmark(main)
