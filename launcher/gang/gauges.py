"""A run's measurements as Ray metrics: Prometheus finds them as `ray_podlaunch_<name>` (docs/monitoring.md).

The supervisor tells what concerns the whole run, every runner what concerns its host; a series ends 20 s after the process that told it.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ray.util.metrics import Gauge

from cluster.tpu.lifecycle import Life
from launcher.runs import RunState, RunStatus

PREFIX = "podlaunch_"
TAGS = ("run", "cluster")
"""On every measurement."""
SHOW_S = 1.0
"""Ray sends values on every 10 s."""
_SLICE_STATES = (Life.PENDING, Life.READY, Life.INTERRUPTED, Life.LOST, Life.DELETING)


@dataclass(frozen=True)
class Measurement:
    name: str
    about: str
    tags: tuple[str, ...] = ()
    """Besides TAGS."""


MEASUREMENTS = (
    Measurement("loss", "Mean nats per learned token of the last logged step."),
    Measurement("held_out_loss", "Mean nats per learned token of the held-out batches, at the newest evaluation."),
    Measurement("tokens_per_second", "Tokens of the global batch over the time of a step."),
    Measurement("mfu", "Model FLOP/s over the peak of all chips, 0 to 1; on TPUs only."),
    Measurement("step_seconds", "Of one step, mean between the last two logged ones."),
    Measurement("step", "Steps that are done; goes back after a rollback."),
    Measurement("total_steps", "Steps that the run shall do."),
    Measurement("checkpoint_step", "Of the newest checkpoint."),
    Measurement("checkpoint_blocking_seconds", "For how long training stood still for the newest checkpoint."),
    Measurement("checkpoint_write_seconds", "From the beginning of the newest checkpoint until it counted."),
    Measurement("goodput", "The share of the run's time that trained something new, 0 to 1."),
    Measurement("phase_seconds", "Where the run's time went so far.", ("phase",)),
    Measurement("run_state", "1 for the state that the run is in, 0 for all others.", ("state",)),
    Measurement("attempt", "The number of the attempt; the first is 0."),
    Measurement("recoveries", "How often the run was recovered.", ("cause",)),
    Measurement("usd_per_hour", "List price of the slices that the run holds now, US dollars an hour."),
    Measurement("cost_usd", "List price of all that the run has used so far, US dollars."),
    Measurement("hosts", "Hosts of the run's gang."),
    Measurement("slices", "Slices of the run's type that its cluster has, in every state of their life.", ("state",)),
    Measurement("host_step", "Steps that the host's training process has told of.", ("host",)),
    Measurement("host_input_stall_seconds", "How long the devices have waited for this host's batches in this attempt.", ("host",)),
    Measurement("host_memory_bytes", "Resident memory of the host's training process.", ("host",)),
)
_BY_NAME = {one.name: one for one in MEASUREMENTS}


class Gauges:
    """Of one run. `gauge` makes one of Ray's."""

    def __init__(self, run: str, cluster: str, gauge: Callable[..., Any] = Gauge) -> None:
        self._own = {"run": run, "cluster": cluster}
        self._gauge = gauge
        self._made: dict[str, Any] = {}

    def set(self, name: str, value: float | None, **tags: str) -> None:
        """Nothing for None: what is not known has no series."""
        if value is None:
            return
        if name not in self._made:
            known = _BY_NAME[name]
            self._made[name] = self._gauge(PREFIX + name, description=known.about, tag_keys=(*TAGS, *known.tags))
        self._made[name].set(value, tags={**self._own, **tags})


class RunGauges:
    """What the supervisor knows."""

    def __init__(
        self,
        gauges: Gauges,
        usd_per_hour: float | None,
        slices: Callable[[], Iterable[Life]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`usd_per_hour`: of all slices of the run. `slices`: the states of the cluster's slices of that type. `clock`: seconds."""
        self._gauges, self._usd_per_hour, self._slices, self._clock = gauges, usd_per_hour, slices, clock
        self._shown = float("-inf")

    def hear(self, index: int, event: Mapping[str, Any]) -> None:
        """What training process `index` said; process 0 speaks for all."""
        if index != 0:
            return
        if event["event"] == "step":
            self._gauges.set("step_seconds", event.get("step_time"))
        elif event["event"] == "checkpoint":
            self._gauges.set("checkpoint_blocking_seconds", event.get("blocking_s"))
            self._gauges.set("checkpoint_write_seconds", event.get("write_s"))

    def show(self, status: RunStatus, *, now: bool = False) -> None:
        """At most every SHOW_S, unless `now`."""
        if not now and self._clock() - self._shown < SHOW_S:
            return
        self._shown = self._clock()
        put = self._gauges.set
        for name in ("loss", "tokens_per_second", "mfu", "goodput", "cost_usd", "step", "total_steps", "attempt", "hosts"):
            put(name, getattr(status, name))
        put("held_out_loss", status.held_out_before if status.held_out_after is None else status.held_out_after)
        put("checkpoint_step", status.checkpoint)
        for phase, seconds in status.phases.items():
            put("phase_seconds", seconds, phase=phase)
        for state in RunState:
            put("run_state", float(state is status.state), state=state.value)
        for cause, count in vars(status.recoveries).items():
            put("recoveries", count, cause=cause)
        if self._usd_per_hour is not None:
            put("usd_per_hour", self._usd_per_hour if status.slices else 0.0)
        states = list(self._slices())
        for life in _SLICE_STATES:
            put("slices", states.count(life), state=life.value)


class HostGauges:
    """What a runner knows of its host."""

    def __init__(self, run: str, cluster: str, host: str) -> None:
        self._gauges, self._host = Gauges(run, cluster), host

    def hear(self, events: Iterable[Mapping[str, Any]]) -> None:
        """What the training process said."""
        steps = [event for event in events if event["event"] == "step"]
        if steps:
            self._gauges.set("host_step", steps[-1].get("step"), host=self._host)
            self._gauges.set("host_input_stall_seconds", steps[-1].get("stall_s"), host=self._host)

    def memory(self, resident: int) -> None:
        """`resident`: bytes of the training process."""
        self._gauges.set("host_memory_bytes", resident, host=self._host)
