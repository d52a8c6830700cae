"""How each point of a sweep stands, by the state of its run."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from launcher.limits import limit_reached
from launcher.runs import RunDirectory, RunState, RunStatus
from launcher.sweep_points import Point


class Standing(StrEnum):
    WAITING = "WAITING"
    """For its turn."""
    UNDER_WAY = "UNDER WAY"
    ENDED = "ENDED"


FOUND: Mapping[RunState, Standing] = {  # what a sweep that begins makes of a run that is there already
    RunState.QUEUED: Standing.UNDER_WAY,
    RunState.STARTING: Standing.UNDER_WAY,
    RunState.RUNNING: Standing.UNDER_WAY,
    RunState.RECOVERING: Standing.UNDER_WAY,
    RunState.SUCCEEDED: Standing.ENDED,
    # To give the command again is to ask for these again; they go on from their checkpoints.
    RunState.FAILED: Standing.WAITING,
    RunState.STOPPED: Standing.WAITING,
    RunState.SUSPENDED: Standing.WAITING,
}
FOLLOWED: Mapping[RunState, Standing] = {  # what it makes of one that it has started or followed: it is not started again
    **FOUND,
    RunState.FAILED: Standing.ENDED,
    RunState.STOPPED: Standing.ENDED,
    RunState.SUSPENDED: Standing.ENDED,
}


@dataclass
class Place:
    """A point of the sweep and how far it has come."""

    point: Point
    run: RunDirectory
    standing: Standing = Standing.WAITING
    status: RunStatus | None = None
    error: str | None = None
    """Why its run could not be started."""
    refusals: int = 0
    """How often it was started in vain."""

    def find(self) -> None:
        """See what is there before anything is started."""
        self.status = self.run.status()
        if self.status is None:
            self.standing = Standing.WAITING
        elif self._has_had_all():
            self.standing = Standing.ENDED
        else:
            self.standing = FOUND[self.status.state]

    def follow(self) -> None:
        """See how far it has come since it was started."""
        self.status = self.run.status()
        if self.status is not None:
            self.standing = FOLLOWED[self.status.state]

    @property
    def state(self) -> str:
        """In a word."""
        if self.error is not None:
            return RunState.FAILED
        return self.standing if self.standing is Standing.WAITING or self.status is None else self.status.state

    @property
    def succeeded(self) -> bool:
        return self.error is None and self.status is not None and self.status.state is RunState.SUCCEEDED

    @property
    def failure(self) -> str | None:
        """Why it has ended without success, in one line; None for all others."""
        status = self.status
        if self.error is not None:
            return self.error
        if self.standing is not Standing.ENDED or status is None or self.succeeded:
            return None
        if status.state is RunState.FAILED and status.first_failure is not None:
            return f"{status.state}, host {status.first_failure.host}: {status.first_failure.error}"
        return f"{status.state}: {status.reason}" if status.reason else status.state.value

    @property
    def score(self) -> float | None:
        """The loss that points are compared by, the lower the better: on held-out data where there is one, else of training."""
        if not self.succeeded or self.status is None:
            return None
        return self.status.loss if self.status.held_out_after is None else self.status.held_out_after

    def _has_had_all(self) -> bool:
        """Whether it was stopped by a limit of its own, run.max_hours or run.max_usd."""
        run, status = self.point.config.run, self.status
        return status is not None and status.state is RunState.STOPPED and limit_reached(run, status.phases, status.costs) is not None
