"""Did the kernel's out-of-memory killer end a process? Read from its counters, which any user may read; Linux only.

The process's own control group counts exactly (cgroup v2: `memory.events`, v1: `memory.oom_control`; both have a line `oom_kill N`, see
the kernel's Documentation/admin-guide/cgroup-v2.rst). A process in the root group has no such file: there the machine's count in
/proc/vmstat (`oom_kill N`, since Linux 4.13) must do.
"""

from pathlib import Path

_WORDS = "the kernel's out-of-memory killer ended a process of this host meanwhile"


class OomWatch:
    """Counts kills from its creation on. `root` stands for `/` in tests."""

    def __init__(self, pid: int, root: Path = Path("/")) -> None:
        self._files = [path for path in (*_group_files(pid, root), root / "proc/vmstat") if _kills(path) is not None][:1]
        self._before = self._count()

    def evidence(self) -> str:
        """What the counters say since then, in words; empty when they say nothing or cannot be read any more."""
        return _WORDS if self._count() > self._before else ""

    def _count(self) -> int:
        return sum(_kills(path) or 0 for path in self._files)


def _group_files(pid: int, root: Path) -> list[Path]:
    """Where the kernel counts for this process's control groups, the unified hierarchy first."""
    try:
        lines = (root / f"proc/{pid}/cgroup").read_text().splitlines()
    except OSError:  # it has ended already
        return []
    groups = [line.split(":", 2) for line in lines]
    mounted = root / "sys/fs/cgroup"
    unified = [mounted / group.lstrip("/") / "memory.events" for number, _, group in groups if number == "0"]
    legacy = [mounted / "memory" / group.lstrip("/") / "memory.oom_control" for _, names, group in groups if "memory" in names.split(",")]
    return [*unified, *legacy]


def _kills(path: Path) -> int | None:
    """The number behind `oom_kill`; None where there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
