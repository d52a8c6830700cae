"""A user's own program in a training process: started as `python FILE` starts it. Real processes, no JAX."""

import json
import os
import queue
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.gang.child import Child, Event

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "code").mkdir()
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def start(run_dir: Path, program: str, entrypoint: str = "main.py", **env: str) -> tuple[Child, "queue.Queue[Event]"]:
    code = run_dir.parent / "code"
    (code / "main.py").write_text(program)
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"job": {"kind": "script", "entrypoint": entrypoint}}))
    variables = {
        "PYTHONPATH": str(ROOT),
        "PYTHONSAFEPATH": "1",
        "PODLAUNCH_USER_CODE": str(code),
        "PODLAUNCH_RUN_DIR": str(run_dir),
        "PODLAUNCH_ATTEMPT": "0",
        "PODLAUNCH_CHECKPOINT_DIR": str(run_dir / "checkpoints"),
        "PODLAUNCH_PROCESS_ID": env.get("JAX_PROCESS_ID", "0"),
    }
    events: queue.Queue[Event] = queue.Queue()
    command = [sys.executable, "-m", "launcher.training.child", str(run_dir), "--attempt", "0"]
    return Child(command, {**os.environ, **variables, **env}, run_dir / "log", events), events


def all_events(events: "queue.Queue[Event]") -> list[Event]:
    found: list[Event] = []
    while not found or found[-1]["event"] != "exit":
        found.append(events.get(timeout=60))
    return found


def run(run_dir: Path, program: str, entrypoint: str = "main.py", **env: str) -> tuple[list[Event], str]:
    events = all_events(start(run_dir, program, entrypoint, **env)[1])
    return events, (run_dir / "log").read_text()


def test_a_program_sees_what_plain_python_would_show_it(run_dir: Path) -> None:
    code = run_dir.parent / "code"
    for name in ("cluster", "launcher", "tools"):
        (code / f"{name}.py").write_text(f"print('own {name}')\n")
    program = (
        "import atexit, json, os, sys\nimport cluster, launcher, tools\natexit.register(print, 'at exit')\n"
        "print(json.dumps([__name__, sys.argv, os.getcwd(), __file__, 'jax' in sys.modules]))\nopen('written', 'w').close()\n"
    )
    events, log = run(run_dir, program, "python main.py --name 'two words'")
    assert events[-1]["code"] == 0
    work = run_dir / "work" / "host-0"
    *own, shown, last = log.splitlines()
    assert own == ["own cluster", "own launcher", "own tools"], "the program's folder stands first"
    assert json.loads(shown) == ["__main__", [str(work / "main.py"), "--name", "two words"], str(work), str(work / "main.py"), False]
    assert last == "at exit"
    assert (work / "written").exists()
    assert not (code / "written").exists(), "the code itself is shared"


def test_a_module_runs_by_its_name(run_dir: Path) -> None:
    (run_dir.parent / "code" / "project").mkdir()
    (run_dir.parent / "code" / "project" / "train.py").write_text("import sys, main; print(__name__, sys.argv[1:])\n")
    events, log = run(run_dir, "", "-m project.train --x 1")
    assert (events[-1]["code"], log) == (0, "__main__ ['--x', '1']\n")


FAILS = {
    "raises": ("raise KeyError('lost')", 1, "KeyError: 'lost'"),
    "does not compile": ("x = = 1", 1, "SyntaxError: invalid syntax (main.py, line 1)"),
    "code": ("import sys; sys.exit(7)", 7, "the program ended with exit code 7"),
    "message": ("import sys; sys.exit('no data here')", 1, "no data here"),
}


@pytest.mark.parametrize("case", FAILS)
def test_a_program_that_fails_says_why(run_dir: Path, case: str) -> None:
    program, code, expected = FAILS[case]
    events, log = run(run_dir, program)
    assert events[-1]["code"] == code
    (error,) = [event["error"] for event in events if event["event"] == "error"]
    assert error.replace(str(run_dir / "work" / "host-0") + "/", "") == expected
    assert "runpy" not in log, "the traceback is the program's own"


def test_a_failed_program_does_not_wait_for_its_exit_handlers(run_dir: Path) -> None:
    """JAX's wait for peers that hang in a collective, while the supervisor waits for this process's end."""
    events, _ = run(run_dir, "import atexit, time; atexit.register(time.sleep, 300); raise ValueError('bad')")
    assert events[-1]["code"] == 1


REPORTS = """
from launcher.training import script
print(script.checkpoint_dir())
script.initialize()
for step in range(1, 4):
    script.report(step, 3, **({"loss": 1.5, "nan": float("nan")} if step > 1 else {}))
assert not script.preempted()
"""


def test_process_0_writes_metrics_and_every_process_tells_its_steps(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "att')  # the attempt before was killed inside a line
    for process in ("0", "1"):
        events, log = run(run_dir, REPORTS, JAX_PROCESS_ID=process)
        assert events[-1]["code"] == 0, log
        steps: list[Any] = [(event["step"], event["total_steps"]) for event in events if event["event"] == "step"]
        assert steps[0] == (1, 3)
        assert steps[-1] == (3, 3)
        assert [event["phase"] for event in events if event["event"] == "phase"] == ["script", "training"]
    assert str(run_dir / "checkpoints") in log
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()[1:]]
    assert [(row["step"], row["attempt"], row["loss"], row["nan"]) for row in rows] == [(2, 0, 1.5, None), (3, 0, 1.5, None)]


STOPS = """
import time
from launcher.training import script
script.preempted()
script.report(1, 10)
while not script.preempted():
    time.sleep(0.01)
print("saved")
"""


def told(child: Child, events: "queue.Queue[Event]") -> list[Event]:
    found: list[Event] = []
    while not found or found[-1]["event"] != "step":
        found.append(events.get(timeout=60))
    child.ask_to_end()
    child.ask_to_end()
    return all_events(events)


def test_a_program_that_was_told_to_end_has_stopped_and_not_finished(run_dir: Path) -> None:
    assert told(*start(run_dir, STOPS))[-1]["code"] == 128 + signal.SIGTERM
    assert (run_dir / "log").read_text() == "saved\n"


def test_a_program_that_finished_all_the_same_has_finished(run_dir: Path) -> None:
    assert told(*start(run_dir, STOPS + "script.report(10, 10)\n"))[-1]["code"] == 0


def test_a_program_that_never_asks_ends_at_once(run_dir: Path) -> None:
    program = "import time\nfrom launcher.training import script\nscript.report(1)\ntime.sleep(300)\n"
    assert told(*start(run_dir, program))[-1]["code"] == -signal.SIGTERM


def test_without_a_launcher_the_helper_works_as_well(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\nfrom launcher.training import script\nscript.initialize()\nprint(script.checkpoint_dir())\n"
        "script.report(1, 2)\nscript.report(2, 2, loss=0.5)\nassert not script.preempted()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\nassert script.preempted() and script.preempted()\nassert 'jax' not in sys.modules\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("PODLAUNCH_")} | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines() == [str(tmp_path / "checkpoints"), "step 2/2  loss 0.5"]


def test_the_helper_is_light() -> None:
    """It takes 10 ms; what could make it slow is an import of ours or of JAX."""
    program = "import json, sys; from launcher.training import script; print(json.dumps(sorted(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60, check=True).stdout
    training = [f"launcher.training.{name}" for name in ("coordinator", "reporter", "rows", "script")]
    ours = ["launcher", "launcher.process_variables", "launcher.training", *training]
    imported = json.loads(out)
    assert [name for name in imported if name.split(".")[0] == "launcher"] == ours
    assert not {"jax", "ray", "yaml", "cluster", "numpy"} & set(imported)


def test_an_error_is_told_although_the_log_takes_no_word_more(run_dir: Path) -> None:
    program = (
        "import resource\nprint('the last word', flush=True)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))\nraise ValueError('what happened')\n"
    )
    events, log = run(run_dir, program)
    assert log == "the last word\n"
    assert [event["error"] for event in events if event["event"] == "error"] == ["ValueError: what happened"]
    assert events[-1]["code"] == 1
