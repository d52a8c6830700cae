"""`python -m launcher.training.compile_check`: compile the training step for a TPU slice on a machine without one.

Reads `{"config": TrainingConfig, "topology": "v6e:4x4", "slices": 1}` from stdin and writes one JSON object, the fields of `Compilation`,
to stdout. `launcher/check.py` starts it with the environment that libtpu needs.
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
import time
from dataclasses import dataclass, field
from typing import Any

_COLLECTIVE = re.compile(r"= [^=]*? (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|send)(?:-start)?\(")
_FUSED = re.compile(r'splash.*custom_call_target="tpu_custom_call"')
_TOO_BIG = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
_UNITS = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30}


@dataclass
class Compilation:
    """What the compiler said. Bytes are of one chip."""

    compiles: bool
    seconds: float
    """Of the compiler alone."""
    cpu_seconds: float = 0.0
    """The same, of all processors: other programs slow the compiler down, and change this little."""
    lowering_seconds: float = 0.0
    """Until the compiler had the program."""
    error: str | None = None
    """One line."""
    fits: bool | None = None
    """None when it does not compile for another reason than memory."""
    needed_bytes: float | None = None
    """Of a program that does not fit, as the compiler tells it."""
    available_bytes: float | None = None
    """Of a program that does not fit: a chip's memory without what the runtime keeps."""
    arguments_bytes: int | None = None
    """Weights, optimizer and batch."""
    temporaries_bytes: int | None = None
    outputs_bytes: int | None = None
    """That take no argument's place."""
    code_bytes: int | None = None
    total_bytes: int | None = None
    collectives: dict[str, int] = field(default_factory=dict)
    """Instructions in the program, by kind; a loop's body counts once."""
    fused_attention: bool = False
    """Whether the fused kernel is in the program."""


def main() -> None:
    request = json.loads(sys.stdin.read())
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no JSON
    with out:
        json.dump(dataclasses.asdict(compile_for(request["config"], request["topology"], request["slices"])), out)


def compile_for(config: dict[str, Any], topology: str, slices: int) -> Compilation:
    """Raises ConfigError for a config that does not fit the slice, RuntimeError when there is no such topology."""
    from jax.experimental import topologies

    from launcher.config import TrainingConfig
    from launcher.training.mesh import make_layout
    from launcher.training.optimizer import make_optimizer
    from launcher.training.state import make_blueprint
    from launcher.training.step import lower_train_step

    training = TrainingConfig.from_dict(config)
    several = {"num_slices": slices} if slices > 1 else {}
    devices = topologies.get_topology_desc(topology, platform="tpu", **several).devices
    layout = make_layout(training.check_devices(len(devices), slices), devices)
    begun = time.monotonic()
    lowered = lower_train_step(make_blueprint(training, layout, make_optimizer(training)))
    started, cpu = time.monotonic(), time.process_time()
    compiled = None
    try:
        compiled = lowered.compile()
        done = Compilation(compiles=True, seconds=time.monotonic() - started, fits=True)
    except Exception as error:  # noqa: BLE001  # whatever the compiler refuses is what this command is there to tell
        done = _refused(error, time.monotonic() - started)
    done.lowering_seconds, done.cpu_seconds = started - begun, time.process_time() - cpu
    if compiled is None:
        return done
    describe(compiled, done)
    return done


def describe(compiled: Any, done: Compilation) -> None:
    """Fill in what the compiled program tells of itself."""
    _weigh(compiled.memory_analysis(), done)
    for line in (compiled.as_text() or "").splitlines():
        if found := _COLLECTIVE.search(line):
            done.collectives[found[1]] = done.collectives.get(found[1], 0) + 1
        done.fused_attention = done.fused_attention or bool(_FUSED.search(line))


def _refused(error: Exception, seconds: float) -> Compilation:
    text = " ".join(str(error).split())
    failed = Compilation(compiles=False, seconds=seconds, error=f"{type(error).__name__}: {text[:500]}")
    if found := _TOO_BIG.search(text):
        failed.fits = False
        failed.needed_bytes, failed.available_bytes = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
    return failed


def _weigh(memory: Any, done: Compilation) -> None:
    done.arguments_bytes = memory.argument_size_in_bytes
    done.temporaries_bytes = memory.temp_size_in_bytes
    done.outputs_bytes = memory.output_size_in_bytes - memory.alias_size_in_bytes
    done.code_bytes = memory.generated_code_size_in_bytes
    done.total_bytes = done.arguments_bytes + done.temporaries_bytes + done.outputs_bytes + done.code_bytes


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
