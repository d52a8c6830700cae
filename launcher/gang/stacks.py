"""Where a process hangs: the stacks of all its threads, read from outside by py-spy, so that the process need not do anything for it."""

import shutil
import subprocess
import sys
from pathlib import Path

import psutil

LIMIT_S = 20.0


def stacks_of(pid: int) -> str:
    """What the process's threads are doing, after a line that says how the system sees it; or why that cannot be told."""
    try:
        process = psutil.Process(pid)
        head = f"process {pid} is {process.status()}, {process.num_threads()} threads\n"
    except psutil.Error as error:
        return f"process {pid} cannot be looked at: {error}\n"
    # Its own copy of the tool, beside its interpreter: a user's PATH may hold another, or none.
    tool = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or "py-spy"
    try:
        # It does not move; to stop it first would wait for ever where it is stopped already.
        found = subprocess.run([tool, "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, timeout=LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{head}no stacks: {error}\n"
    said = found.stdout if found.returncode == 0 else b"no stacks: " + (found.stderr.strip() or b"py-spy gave no reason") + b"\n"
    return head + said.decode(errors="replace")
