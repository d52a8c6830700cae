"""The life of a run under its supervisor, as one table: (stage, what happens) -> the next stage and what has to be done.

    RESERVING -> JOINING -> STARTING -> RUNNING -> SUCCEEDED
                   |           |  LEAVING |           what the cloud announced: checkpoint while there is time
                   |           +-> GATHERING <-+      something failed: what do the other hosts say?
                   +-----------> JUDGING <-----+---> FAILED
                                    |
            STARTING <- PAUSING <---+---> MOVING -> RESERVING      the same hosts, or new ones

    from wherever processes run: STOPPING -> STOPPED

Knows no Ray, no clock and no files. launcher/gang/supervisor.py turns what it sees into happenings and carries the effects out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from launcher.goodput import Phase
from launcher.runs import RunState


class Stage(Enum):
    """Where a supervisor stands."""

    RESERVING = "reserving"
    """A pending placement group asks for the run's slices."""
    JOINING = "joining"
    """The slices are there, their hosts join one by one."""
    STARTING = "starting"
    """Every host has its process; none has done a step."""
    RUNNING = "running"
    LEAVING = "leaving"
    """The cloud announced to take a host away; the gang was asked to checkpoint and end."""
    GATHERING = "gathering"
    """A process failed or a host is lost. The others are heard for a moment before the gang is killed."""
    JUDGING = "judging"
    """Momentary: which cause, which budget?"""
    PAUSING = "pausing"
    """Between two attempts on the same hosts."""
    MOVING = "moving"
    """Between two attempts, with everything given back."""
    STOPPING = "stopping"
    """The gang was asked to checkpoint and end, because the run has to stop."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"


class Happening(Enum):
    """What the outside world does; the verdicts are the supervisor's own."""

    RESERVED = "the slices are there"
    JOINED = "all their hosts are there"
    PROGRAM = "the user's own program begins; it need not tell any step"
    STEP = "the attempt's first step is done"
    NOTICE = "the cloud announces the end of a host"
    FAILURE = "a process failed, or a host is lost or does not answer"
    GONE = "all processes have ended, and some failed"
    FINISHED = "all processes have ended, and none had work left"
    YIELDED = "all processes have ended, and some because they were asked to"
    STOP = "somebody wants the run to checkpoint and end"
    STOP_NOW = "somebody wants the run to end without a checkpoint"
    HUNG = "the processes live and make no progress"
    TIME_UP = "the stage has its own time limit, and that has passed"
    AGAIN_HERE = "verdict: another attempt, on the same hosts"
    AGAIN_ELSEWHERE = "verdict: another attempt, on new hosts"
    OVER = "verdict: no other attempt"


class Effect(Enum):
    """What the supervisor does when it enters a stage, in this order."""

    RESERVE = "ask for the slices"
    PLACE = "start a runner on each host"
    START = "start a process on each host"
    ASK_TO_END = "ask all processes to checkpoint and end"
    DUMP = "write down where all processes stand"
    JUDGE = "find the cause and ask the budgets; the verdict is the next happening"
    REPLACE = "have the slices deleted that the evidence blames"
    KILL = "end all processes now, keep the hosts"
    RELEASE = "end what runs, give runners and slices back"


@dataclass(frozen=True)
class Step:
    """What follows."""

    stage: Stage
    effects: tuple[Effect, ...] = ()


ENDS = frozenset({Stage.SUCCEEDED, Stage.FAILED, Stage.STOPPED})

SHOWN: Mapping[Stage, RunState] = {
    Stage.RUNNING: RunState.RUNNING,
    Stage.PAUSING: RunState.RECOVERING,
    Stage.MOVING: RunState.RECOVERING,
    Stage.SUCCEEDED: RunState.SUCCEEDED,
    Stage.FAILED: RunState.FAILED,
    Stage.STOPPED: RunState.STOPPED,
}
"""The state that status.json shows from a stage on; in the others it stays what it was (STARTING, RUNNING or RECOVERING)."""

PHASES: Mapping[Stage, str] = {
    Stage.RESERVING: Phase.CAPACITY,
    Stage.JOINING: Phase.BOOTING,
    Stage.STARTING: Phase.STARTING,
    Stage.GATHERING: Phase.RECOVERING,
    Stage.PAUSING: Phase.RECOVERING,
    Stage.MOVING: Phase.RECOVERING,
    Stage.STOPPING: "stopping",
}
"""The phase that status.json shows from a stage on; in the others it is what process 0 said last. "stopping" is only shown: the time is
still that of what the processes do.
"""

_S, _H, _E = Stage, Happening, Effect
_SUCCESS = Step(_S.SUCCEEDED, (_E.RELEASE,))
_STOP = Step(_S.STOPPED, (_E.RELEASE,))
_ASK = Step(_S.STOPPING, (_E.ASK_TO_END,))
_JUDGE = Step(_S.JUDGING, (_E.JUDGE,))
_LOOK = Step(_S.JUDGING, (_E.DUMP, _E.JUDGE))
_LEAVE = Step(_S.LEAVING, (_E.ASK_TO_END,))
_GATHER = Step(_S.GATHERING)
_START = Step(_S.STARTING, (_E.START,))
_RESERVE = Step(_S.RESERVING, (_E.RESERVE,))

# What runs may end in these ways, wherever it stands.
_AT_WORK = {
    _H.FAILURE: _GATHER,
    _H.GONE: _JUDGE,
    _H.FINISHED: _SUCCESS,
    _H.YIELDED: _JUDGE,
    _H.STOP: _ASK,
    _H.STOP_NOW: _STOP,
}
_AT_REST = {_H.STOP: _STOP, _H.STOP_NOW: _STOP}
_ROWS: Mapping[Stage, Mapping[Happening, Step]] = {
    _S.RESERVING: {_H.RESERVED: Step(_S.JOINING), **_AT_REST},
    _S.JOINING: {_H.JOINED: Step(_S.STARTING, (_E.PLACE, _E.START)), _H.TIME_UP: _JUDGE, **_AT_REST},
    _S.STARTING: {**_AT_WORK, _H.PROGRAM: Step(_S.RUNNING), _H.STEP: Step(_S.RUNNING), _H.NOTICE: _LEAVE, _H.HUNG: _LOOK},
    _S.RUNNING: {**_AT_WORK, _H.NOTICE: _LEAVE, _H.HUNG: _LOOK},
    # They were asked already: a second request finds them saving.
    _S.LEAVING: {**_AT_WORK, _H.STOP: Step(_S.STOPPING), _H.TIME_UP: _JUDGE},
    _S.GATHERING: {_H.TIME_UP: _JUDGE, _H.GONE: _JUDGE, **_AT_REST},
    _S.JUDGING: {
        _H.AGAIN_HERE: Step(_S.PAUSING, (_E.KILL,)),
        _H.AGAIN_ELSEWHERE: Step(_S.MOVING, (_E.REPLACE, _E.RELEASE)),
        _H.OVER: Step(_S.FAILED, (_E.RELEASE,)),
        **_AT_REST,
    },
    # A host that does not even answer to be cleared is lost: its gang needs new ones.
    _S.PAUSING: {_H.FAILURE: Step(_S.MOVING, (_E.RELEASE,)), _H.TIME_UP: _START, **_AT_REST},
    _S.MOVING: {_H.TIME_UP: _RESERVE, **_AT_REST},
    # Who was asked to end and came to the end has finished; one that fails leaves the others waiting for it.
    _S.STOPPING: {
        _H.FAILURE: _STOP,
        _H.GONE: _STOP,
        _H.FINISHED: _SUCCESS,
        _H.YIELDED: _STOP,
        _H.STOP_NOW: _STOP,
        _H.TIME_UP: _STOP,
    },
    _S.SUCCEEDED: {},
    _S.FAILED: {},
    _S.STOPPED: {},
}
TRANSITIONS: Mapping[tuple[Stage, Happening], Step] = {
    (stage, happening): _ROWS[stage].get(happening, Step(stage)) for stage in Stage for happening in Happening
}
"""The whole table. What means nothing in a stage (a step after a notice, what a killed process still said) changes nothing."""

BEGIN = _RESERVE
"""How a supervisor begins."""
