"""`python -m launcher.training.compile_check`: compile the training step for a TPU slice on a machine without one.

Reads `{"config": TrainingConfig, "topology": "v6e:4x4", "slices": 1, "quick": false, "keep": null}` from stdin and writes one JSON object,
the fields of `Compilation`, to stdout. `launcher/check.py` starts it with the environment that libtpu needs. `quick`: only as far as every
buffer has its place, which takes seconds; the rest, which makes machine code of the program, takes minutes. `keep`: a folder for the
compiled program, as an entry of JAX's persistent compilation cache.

Bytes are those of the compiler's own plan of a chip's memory, which it dumps: they decide whether a program fits. They are less than what
`memory_analysis()` sums up, which counts donated weights again among the temporaries (libtpu 0.0.42 compiled a program for a chip of 31 GiB
that came to 36 GiB so, and to 28 by the plan).
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_COLLECTIVE = re.compile(r"= [^=]*? (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|send)(?:-start)?\(")
_FUSED = re.compile(r'splash.*custom_call_target="tpu_custom_call"')
_TOO_BIG = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*)$", re.MULTILINE)
_UNITS = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30}


@dataclass
class Compilation:
    """What the compiler said. Bytes are of one chip."""

    compiles: bool | None
    """None when nobody waited for it."""
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
    analysis_bytes: int | None = None
    """The same as `memory_analysis()` sums it up."""
    collectives: dict[str, int] = field(default_factory=dict)
    """Instructions in the program, by kind; a loop's body counts once."""
    fused_attention: bool = False
    """Whether the fused kernel is in the program."""


def main() -> None:
    request = json.loads(sys.stdin.read())
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no JSON
    with out:
        json.dump(dataclasses.asdict(compile_for(**request)), out)
    if request.get("quick"):
        os._exit(0)  # the compiler is still at work


def compile_for(config: dict[str, Any], topology: str, slices: int, quick: bool = False, keep: str | None = None) -> Compilation:
    """Raises ConfigError for a config that does not fit the slice, RuntimeError when there is no such topology."""
    from jax.experimental import topologies

    from launcher.config import TrainingConfig
    from launcher.training.compilation_cache import keep_in
    from launcher.training.mesh import make_layout
    from launcher.training.optimizer import make_optimizer
    from launcher.training.state import make_blueprint
    from launcher.training.step import lower_train_step

    if keep is not None:
        keep_in(keep)
    training = TrainingConfig.from_dict(config)
    several = {"num_slices": slices} if slices > 1 else {}
    devices = topologies.get_topology_desc(topology, platform="tpu", **several).devices
    layout = make_layout(training.check_devices(len(devices), slices), devices)
    begun = time.monotonic()
    lowered = lower_train_step(make_blueprint(training, layout, make_optimizer(training)))
    done = compile_lowered(lowered, quick)
    done.lowering_seconds = time.monotonic() - begun - done.seconds
    return done


def compile_lowered(lowered: Any, quick: bool = False) -> Compilation:
    """What the compiler says of a `jax.stages.Lowered`. With `quick` it goes on in a thread that this process has to end."""
    started, cpu = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        plan, options = Plan(Path(folder)), {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled, error = _until(lambda: lowered.compile(compiler_options=options), plan if quick else None)
        taken = time.monotonic() - started
        done = Compilation(None, taken) if error is None else _refused(error, taken)
        done.cpu_seconds = time.process_time() - cpu
        if error is None:
            done.fits = True
            plan.weigh(done)
            _describe(plan.program, done)
    if compiled is not None:
        done.compiles = True
        _finish(compiled.memory_analysis(), done)
    return done


def _until(compile_it: Callable[[], Any], plan: "Plan | None") -> tuple[Any, Exception | None]:
    """(what was compiled, None when not waited for; what was refused). With `plan`: until that is there."""
    compiled: list[Any] = []
    refused: list[Exception] = []

    def work() -> None:
        try:
            compiled.append(compile_it())
        except Exception as error:  # noqa: BLE001  # whatever the compiler refuses is what this command is there to tell
            refused.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive() and not (plan and plan.is_there):
        thread.join(0.2 if plan else None)
    return compiled[0] if compiled else None, refused[0] if refused else None


@dataclass(frozen=True)
class Plan:
    """What the compiler dumps once every buffer has its place."""

    folder: Path

    @property
    def is_there(self) -> bool:
        return self.program.rstrip().endswith("}")

    @property
    def program(self) -> str:
        """Empty while there is none."""
        return self._read("after_buffer_assignment.txt")

    def weigh(self, done: Compilation) -> None:
        """A chip's memory by kind: colors are its other memories."""
        found = [
            (int(size), kind) for size, kind in _ALLOCATION.findall(self._read("buffer-assignment.txt")) if not kind.startswith("color")
        ]
        if not found:
            return
        done.arguments_bytes = sum(size for size, kind in found if kind.startswith("parameter"))
        done.outputs_bytes = sum(size for size, kind in found if kind.startswith(("output", "maybe-live-out")))
        done.total_bytes = sum(size for size, _ in found)
        done.temporaries_bytes = done.total_bytes - done.arguments_bytes - done.outputs_bytes

    def _read(self, ending: str) -> str:
        return next((path.read_text() for path in sorted(self.folder.glob(f"*-{ending}")) + sorted(self.folder.glob(f"*_{ending}"))), "")


def _describe(program: str, done: Compilation) -> None:
    """Fill in what the program's text tells."""
    for line in program.splitlines():
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


def _finish(memory: Any, done: Compilation) -> None:
    """What is known only of a program that is compiled to its end."""
    done.code_bytes = memory.generated_code_size_in_bytes
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    done.analysis_bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs + memory.generated_code_size_in_bytes
    done.total_bytes = done.analysis_bytes if done.total_bytes is None else done.total_bytes + done.code_bytes


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
