"""The user's own program (job=script) in a training process: started the way `python train.py` starts it, told where it is.

Its working directory, work/host-<i> in the run directory, gets a copy of the code at every attempt; what the program writes there stays.
The folder of the program stands first on its path as always, so that no module of ours shadows one of the user's.
"""

import contextlib
import json
import os
import runpy
import shutil
import signal
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import wrapt
import yaml

from launcher.entrypoint import Entrypoint, parse_entrypoint
from launcher.training.compilation_cache import keep_on_every_host
from launcher.training.jax_cluster import introduce_to_jax
from launcher.training.reporter import Reporter

# Settings that a program is given where it runs on XLA's CPU devices: there, several steps under way at once deadlock.
_CPU_SETTINGS = {"jax_cpu_enable_async_dispatch": False}
_CACHE_SETTINGS = {"jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": -1}


class ProgramFailed(Exception):
    """The program ended with an error, which is printed. `code`: its exit code; the message is one line."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def program_of(run_dir: Path) -> Entrypoint | None:
    """What job=script of the run's config names; None for job=train. Read here, since the schema would import half of ours."""
    job = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8")).get("job") or {}
    return parse_entrypoint(job["entrypoint"]) if job.get("kind") == "script" else None


def run_program(program: Entrypoint, code: Path, work: Path, reporter: Reporter) -> None:
    """Returns when the program has ended well. Raises ProgramFailed."""
    shutil.copytree(code, work, dirs_exist_ok=True)
    os.chdir(work)
    set_environment()
    introduce_to_jax()
    keep_on_every_host()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    reporter.emit("phase", phase="script")
    _forget_ours()
    try:
        _execute(program, work)
    except SystemExit as end:
        _check(end)
    except BaseException as error:  # noqa: BLE001  # the outermost frame of the user's program, as the interpreter is otherwise
        with contextlib.suppress(OSError):  # the disk of the log may be what is full; what counts is raised
            traceback.print_exception(type(error), error, _theirs(error.__traceback__))
        raise ProgramFailed(1, " ".join(f"{type(error).__name__}: {error}".split())) from None


def _execute(program: Entrypoint, work: Path) -> None:
    if program.module is not None:
        sys.path.insert(0, str(work))
        sys.argv = [program.module, *program.arguments]
        runpy.run_module(program.module, run_name="__main__", alter_sys=True)
    else:
        path = work / str(program.file)
        sys.path.insert(0, str(path.parent))
        sys.argv = [str(path), *program.arguments]
        runpy.run_path(str(path), run_name="__main__")


def set_environment() -> None:
    os.environ.pop("PYTHONSAFEPATH", None)  # for us; Python programs that the user's starts are as they always are
    settings: dict[str, Any] = dict(_CPU_SETTINGS)
    if cache := os.environ.get("PODLAUNCH_COMPILATION_CACHE"):
        settings |= {"jax_compilation_cache_dir": cache, **_CACHE_SETTINGS}
    ours = {name: value for name, value in settings.items() if name.upper() not in os.environ}
    texts = {name.upper(): value if isinstance(value, str) else json.dumps(value) for name, value in ours.items()}
    os.environ.update(texts)

    def settle(jax: Any) -> None:
        for name, value in ours.items():
            if os.environ.get(name.upper()) == texts[name.upper()]:  # the program has not chosen another one
                jax.config.update(name, value)

    # Not all of JAX's settings are read from the environment, and a process that was warm before its run has imported JAX already.
    wrapt.register_post_import_hook(settle, "jax")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # both are text files here


def _forget_ours() -> None:
    """A package of the user's may have the name of ours."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "launcher"]:
        del sys.modules[name]


def _check(end: SystemExit) -> None:
    """What the interpreter makes of sys.exit(). Raises ProgramFailed unless it means success."""
    if end.code is None or end.code == 0:
        return
    if isinstance(end.code, int):
        raise ProgramFailed(end.code & 0xFF, f"the program ended with exit code {end.code}") from None
    print(end.code, file=sys.stderr)
    raise ProgramFailed(1, " ".join(str(end.code).split())) from None


def _theirs(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the user's own first line on."""
    ours = (__file__, runpy.__file__, "<frozen runpy>")
    while trace is not None and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    return trace
