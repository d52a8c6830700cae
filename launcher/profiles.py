"""What the command, the supervisor, the runner and the training processes have to agree on about profiles.

The file `profile` of a run directory asks for one. The supervisor passes it on and removes it when all hosts have answered.
"""

import json
import time
from dataclasses import asdict, dataclass

REQUEST = "profile"
"""The file that asks, in the run directory."""
FOLDER = "profiles"
"""`tensorboard --logdir` of it shows them all."""
MOST_STEPS = 100
"""The buffers of a TPU's tracer hold seconds, not minutes."""


@dataclass(frozen=True)
class ProfileRequest:
    """Trace so many steps on every host."""

    id: str
    """What it is called in XProf."""
    steps: int

    @classmethod
    def now(cls, steps: int, clock: float) -> "ProfileRequest":
        """`clock`: seconds since the epoch."""
        return cls(time.strftime("%Y_%m_%d_%H_%M_%S", time.localtime(clock)), steps)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "ProfileRequest":
        """Raises ValueError for what is none."""
        try:
            values = json.loads(text)
            return cls(str(values["id"]), int(values["steps"]))
        except (TypeError, KeyError) as error:
            raise ValueError(f"no request for a profile: {text!r}") from error


def traces_of(request: str) -> str:
    """The folder of a request's traces, relative to the run directory: the layout that XProf reads."""
    return f"{FOLDER}/plugins/profile/{request}"


def trace_name(request: str, host: int) -> str:
    """The same of one host's trace."""
    return f"{traces_of(request)}/host-{host}.xplane.pb"
