"""A run directory with a program of the user's, as a launch of job=script leaves it for the hosts."""

from pathlib import Path

from cluster.config import ClusterConfig
from launcher import code
from launcher.config import JobConfig, LaunchConfig, RunConfig
from launcher.runs import RunDirectory


def make_script_run(folder: Path, program: str) -> RunDirectory:
    """`<folder>/run`, whose code is `<folder>/code/main.py`."""
    (folder / "code").mkdir()
    (folder / "code" / "main.py").write_text(program)
    cluster = ClusterConfig(name="c", accelerator_type="v4-16", cloud="emulated")
    run = RunDirectory(folder / "run")
    run.create(LaunchConfig(cluster, job=JobConfig("script", "main.py"), run=RunConfig(name="a")))
    run.write_code(code.pack(folder / "code"))
    return run
