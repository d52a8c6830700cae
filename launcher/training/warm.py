"""`python -m launcher.training.warm`: a process that imports what training needs before anybody knows what will be trained.

The host's nursery (launcher/gang/nursery.py) keeps one between runs. Its orders hold a whole environment, with the place of the run's code.
Where what it has imported may not be what the run means, it becomes a new Python by exec, in the same process with the same pipes: nothing
is won then, and nothing lost.
"""

import contextlib
import importlib
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.process_variables import EVENT_FD, ORDERS_FD, PARENT_PID, REQUEST_FD, STOP_FD
from launcher.training.child import die_with_parent, may_be_looked_at
from launcher.training.jax_cluster import COORDINATOR, PROCESS, PROCESSES
from launcher.training.program import program_of
from launcher.training.spare import LIBRARIES, import_gently, libraries_of, read_orders

_CHILD = "launcher.training.child"
_OURS = ("launcher", "cluster")
_READ_BY_IMPORTS = ("JAX_", "XLA_", "LIBTPU_")
_KEPT = (EVENT_FD, STOP_FD, REQUEST_FD, PARENT_PID)
"""Of its own environment: what the nursery has given it."""


def main() -> None:
    die_with_parent()
    may_be_looked_at()
    before = dict(os.environ)
    with contextlib.suppress(Exception):  # who is to run meets the same error, and has a log that says so
        import_gently(LIBRARIES)
    arguments, environment = read_orders(int(os.environ[ORDERS_FD]))
    environment |= {name: before[name] for name in _KEPT}
    if read_by_imports(environment) != read_by_imports(before) or not imports_for(arguments, environment):
        os.execve(sys.executable, [sys.executable, "-m", _CHILD, *arguments], environment)
    for name in before.keys() - environment.keys():
        os.environ.pop(name, None)
    os.environ.update(environment)  # beside what imports have set there: JAX tells libtpu of itself so
    become(arguments)


def read_by_imports(environment: Mapping[str, str]) -> dict[str, str]:
    """The settings that libraries read when they are imported; an attempt's place among the others is asked for later."""
    names = {name for name in environment if name.startswith(_READ_BY_IMPORTS)} - {COORDINATOR, PROCESSES, PROCESS}
    return {name: environment[name] for name in names}


def imports_for(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether what is imported is what the run will import: our training does, a program of the user's if it names JAX and has no eye on
    its environment.
    """
    if "jax" not in sys.modules:
        return False
    return program_of(Path(arguments[0])) is None or "jax" in libraries_of(Path(environment["PODLAUNCH_USER_CODE"]))


def become(arguments: Sequence[str]) -> None:
    """The training process of the run, whose code is on the path of its environment, before what this host has installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] in _OURS]:
        del sys.modules[name]
    sys.path[:0] = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    importlib.invalidate_caches()
    sys.argv = [_CHILD, *arguments]
    runpy.run_module(_CHILD, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
