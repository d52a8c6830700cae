"""A spare: a training process that has imported what it will need, and waits for its orders in a pipe.

The runner starts it while another process trains, and hands it the command line, the environment of the attempt and the log when that one
is gone: a restart then costs no import. A host's first process is one too, which imports while the rest of the gang is placed. Importing
JAX claims no TPU, the first use of a device does; a spare uses none.
"""

import contextlib
import importlib
import json
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launcher.process_variables import HURRY, ORDERS_FD
from launcher.training.program import program_of, set_environment

_TRAINING = ("launcher.config", "launcher.training.job")
LIBRARIES = ("jax", "flax.nnx", "optax", "orbax.checkpoint", "numpy")
"""What a user's program may find imported, if it names it."""
_LOWEST_PRIORITY = 19
_ENVIRONMENT = re.compile(r"\b(environ|putenv|dotenv)\b")


def take_orders(run_dir: Path) -> list[str]:
    """Imports, then waits; returns the command line. Ends the process when the runner wants no spare any more."""
    fd = int(os.environ.pop(ORDERS_FD))
    if program_of(run_dir) is None:
        names = list(_TRAINING)
    else:
        set_environment()
        names = libraries_of(Path(os.environ["PODLAUNCH_USER_CODE"]))
    with contextlib.suppress(Exception):  # who is to run meets the same error, and has a log that says so
        if os.environ.pop(HURRY, None) is None:
            import_gently(names)
        else:
            for name in names:
                importlib.import_module(name)
    arguments, environment = read_orders(fd)
    os.environ.update(environment)
    return arguments


def read_orders(fd: int) -> tuple[list[str], dict[str, str]]:
    """Waits for them: the command line, and variables of the environment. What is written goes into the run's log from now on."""
    with os.fdopen(fd, encoding="utf-8") as pipe:
        line = pipe.readline()
    if not line:
        os._exit(0)
    orders = json.loads(line)
    log = os.open(orders["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return orders["arguments"], orders["environment"]


def import_gently(names: Sequence[str]) -> None:
    """In a thread of the lowest priority: on a small machine the process that trains goes first. This process keeps its own priority."""
    if not names:
        return
    importlib.import_module("numpy")  # its pool of threads begins with the import, and would keep that priority
    with ThreadPoolExecutor(1, initializer=_give_way) as importing:
        for name in names:
            importing.submit(importlib.import_module, name).result()


def _give_way() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)  # on Linux that is the thread's


def libraries_of(code: Path) -> list[str]:
    """What may be imported before the program runs: nothing, if that touches environment variables, which could be meant for an import."""
    sources = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(code.rglob("*.py"))]
    if any(_ENVIRONMENT.search(source) for source in sources):
        return []
    return [
        name for name in LIBRARIES if any(re.search(rf"^\s*(import|from)\s+{name.partition('.')[0]}\b", source, re.M) for source in sources)
    ]
