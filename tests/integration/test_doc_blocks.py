"""Every shell block of README.md, CONTRIBUTING.md and docs/, statement by statement as a reader types them, on one emulated cluster.

Each page has a folder of its own, with the files that it takes for granted; in that folder the defaults of runs are small ones
(conf/local/default.yaml, as README has it). What is typed stands in the page, except for words in capitals: NODE is a node's name.
A block that cannot be run here says why in a comment before it, `<!-- not run: ... -->`; without that it has to end well.
"""

import contextlib
import dataclasses
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launcher.runs import RunState
from tests.integration.conftest import Home, eventually, make_home
from tests.integration.doc_blocks import DOCUMENTS, ROOT, Block, blocks, statements
from tests.stub_gcloud import checking_gcloud

pytestmark = pytest.mark.timeout(900)
LIMIT_S = 550.0

SMALL = """# @package _global_
trainer: {steps: 8, warmup_steps: 2, eval_batches: 1, log_every: 1}
"""
PAIRS = "".join(json.dumps({"prompt": f"{k} + 1 = ", "response": str(k + 1)}) + "\n" for k in range(200))
PROGRAM = "import sys\nfrom launcher.training import script\nscript.report(1, 1, loss=0.5)\nprint(sys.argv[1:])\n"
CONFIG = "model: {variant: gemma3-nano}\ndata: {source: python_stdlib}\ntrainer: {steps: 8, seq_len: 32, eval_batches: 1}\n"


@dataclass(frozen=True)
class Page:
    files: dict[str, str] = field(default_factory=dict)
    """That a reader of the page has, by name."""
    before: tuple[str, ...] = ()
    """What was typed before."""
    meanwhile: tuple[str, ...] = ()
    """Statements that go on in another terminal while those after them are typed."""
    emulated: bool = False
    """Clusters of Google Cloud are asked for from the emulated one, as the settings of this machine say."""
    long: bool = False


TRAINS = "podlaunch run.name=mine trainer.steps=100000"
PAGES = {
    "README.md": Page(
        files={"conf/local/default.yaml": SMALL, "pairs.jsonl": PAIRS, "train.py": PROGRAM, "config.yaml": CONFIG},
        meanwhile=("podlaunch run.name=mine run.resume=true trainer.lr=1e-5 trainer.steps=400",),
        long=True,
    ),
    "docs/monitoring.md": Page(files={"conf/local/default.yaml": SMALL}, before=(TRAINS,), meanwhile=(TRAINS,), long=True),
    # Its run has the name of another page's, from another folder: that wants another cluster.
    "docs/recovery.md": Page(files={"conf/local/default.yaml": SMALL}, before=("tpu stop -y", "podlaunch run.name=mine"), long=True),
    "docs/sweeps.md": Page(files={"conf/local/default.yaml": SMALL}, long=True),
    "docs/check-before-you-pay.md": Page(long=True),
    "docs/first-day-on-google-cloud.md": Page(emulated=True, long=True),
    "docs/your-own-data.md": Page(long=True),
    "docs/your-own-script.md": Page(),
    "docs/commands.md": Page(),
}
BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
RUN = [block for block in BLOCKS if block.excuse is None]

GOES_ON = re.compile(r"tpu (train )?status\b.* --watch|tpu train attach|tpu train logs .*-f\b")
"""Ends with Ctrl-C. That of a watch is no error; to follow a run ends with 130."""
ASKS = re.compile(r"tpu (emulator )?stop(?!.* -y)|tpu start v(?!.* (-y|--dry-run))")
"""Whether to go on, which is answered with y."""
FINDS_FAULT = ("tpu doctor",)
"""Ends with 1 where this machine lacks something."""
NO_PROJECT = ("GOOGLE_CLOUD_PROJECT", "PODLAUNCH_BUCKET")
"""Of what a page exports: `tpu status` would ask Google about them."""


class Reader:
    """Types the statements of one page."""

    def __init__(self, home: Home, document: str) -> None:
        self.page = PAGES.get(document, Page())
        self.home = dataclasses.replace(home, folder=home.folder.parent / Path(document).stem)
        self.others: dict[str, subprocess.Popen[str]] = {}
        """By the run that they follow."""
        self._exported: dict[str, str] = {}
        self._gcloud = checking_gcloud(self.home.folder.parent / "bin")["PATH"]
        self._own = str(self.home.folder.parent / "home")  # what --install-completion writes to
        Path(self._own).mkdir(exist_ok=True)
        self.home.folder.mkdir()
        if self.page.emulated:
            self._emulate()
        shutil.copytree(ROOT / "examples", self.home.folder / "examples")  # of the checkout that a reader stands in
        for name, text in self.page.files.items():
            place = self.home.folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)

    def type(self, statement: str) -> str:
        """What was printed. Fails where a reader would see an error."""
        began = time.monotonic()
        try:
            return self._type(statement)
        finally:
            print(f"{time.monotonic() - began:6.1f} s  {statement}")

    def _type(self, statement: str) -> str:
        words = re.sub(r"\bNODE\b", self._node, statement)
        command = words.partition("  #")[0].strip()
        if command in self.page.meanwhile:
            return self._in_another_terminal(command)
        if GOES_ON.match(command):
            return self._until_ctrl_c(command)
        with self._terminal() if ASKS.match(command) else contextlib.nullcontext(subprocess.DEVNULL) as stdin:
            done = subprocess.run(
                [*BASH, f"{words}\nenv -0 > {self._left}"],
                cwd=self.home.folder,
                env=self.env,
                stdin=stdin,
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                check=False,
            )
        assert done.returncode == 0 or command in FINDS_FAULT, f"{statement}\n{done.stdout}{done.stderr}"
        self._exported = dict(line.split("=", 1) for line in self._left.read_text().split("\0") if line)
        if stopped := re.match(r"tpu train stop ([\w-]+)", command):
            self._see_the_end(stopped[1])
        return done.stdout

    def finish(self) -> None:
        """End what still goes on in other terminals."""
        for name in list(self.others):
            self.home.tpu("train", "stop", name, "--now")
            self._see_the_end(name)

    def _see_the_end(self, run: str) -> None:
        process = self.others.pop(run)
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 100, said
        assert self.home.status(run).state is RunState.STOPPED

    @property
    def env(self) -> dict[str, str]:
        kept = {name: value for name, value in self._exported.items() if name not in NO_PROJECT}
        programs = f"{Path(sys.executable).parent}{os.pathsep}{self._gcloud}"
        own = {"SHELL": "/bin/sh", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PATH": programs, "HOME": self._own}
        return {**self.home.env, **kept, **own}

    @property
    def _left(self) -> Path:
        return self.home.folder.parent / "environment"

    def _start(self, command: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["env", "--default-signal=INT", *BASH, f"exec {command}"],
            cwd=self.home.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _in_another_terminal(self, command: str) -> str:
        process = self._start(command)
        (name,) = run_names(command)
        self.others[name] = process
        run = self.home.run(name)
        before = 0 if (status := run.status()) is None else status.step

        def trains() -> bool:
            assert process.poll() is None, process.communicate()[0]
            return (now := run.status()) is not None and now.state is RunState.RUNNING and now.step > before

        eventually(trains, f"steps of: {command}")
        return ""

    def _until_ctrl_c(self, command: str) -> str:
        """As on a terminal, where everything that was started by the command hears of it."""
        process = self._start(command)
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first, f"{command} ended with {process.wait()} and said nothing"
        os.killpg(process.pid, signal.SIGINT)
        said = first + process.communicate(timeout=60)[0]
        assert process.returncode == (0 if "--watch" in command else 130), said
        assert all(other.poll() is None for other in self.others.values()), "what runs goes on"
        return said

    @contextlib.contextmanager
    def _terminal(self) -> Iterator[int]:
        """Somebody who says yes sits before it."""
        ours, theirs = pty.openpty()
        os.write(ours, b"y\n")
        try:
            yield theirs
        finally:
            os.close(ours)
            os.close(theirs)

    def _node(self, _: "re.Match[str]") -> str:
        nodes = json.loads(self.home.tpu("emulator", "status", "--json").stdout)["nodes"]
        return str(nodes[0]["name"].rpartition("/")[2])

    def _emulate(self) -> None:
        where = json.loads(self.home.tpu("emulator", "start", "--profile", "instant", "--json").stdout)
        cluster = {"project": "my-project", "endpoint": where["grpc"], "compute_endpoint": where["rest"], "secrets_endpoint": where["grpc"]}
        self.page.files["conf/local/default.yaml"] = f"# @package _global_\ncluster: {json.dumps(cluster)}\n"


BASH = ("bash", "-euo", "pipefail", "-c")


def run_names(statement: str) -> list[str]:
    return re.findall(r"\brun\.name=([\w-]+)", statement)


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    yield from make_home()


@pytest.fixture(scope="module")
def readers() -> dict[str, Reader]:
    """By page, once its first block is run."""
    return {}


def marked(block: Block) -> object:
    page = PAGES.get(block.document, Page())
    return pytest.param(block, id=block.id, marks=[pytest.mark.long] if page.long else [])


@pytest.mark.parametrize("block", [marked(block) for block in RUN])
def test_a_block_runs_as_it_stands(home: Home, readers: dict[str, Reader], block: Block) -> None:
    if block.document not in readers:
        readers[block.document] = reader = Reader(home, block.document)
        for statement in reader.page.before:
            reader.type(statement)
    reader = readers[block.document]
    for statement in statements(block.text):
        said = reader.type(statement)
        if "podlaunch -m" in statement:
            assert re.search(r"^result +(\d+) of \1 points SUCCEEDED$", said, re.MULTILINE), said
            continue
        for name in set(run_names(statement)) - set(reader.others):
            check_run(reader.home, name, said)
    if block is last_of(block.document):
        reader.finish()


def check_run(home: Home, name: str, said: str) -> None:
    status = home.status(name)
    assert status.state is RunState.SUCCEEDED
    if home.run(name).config().is_script:
        return
    assert status.held_out_after is not None
    assert "held-out loss after training" in said
    if home.run(name).config().training.trainer.samples.prompts:
        assert "  after     " in said


def last_of(document: str) -> Block:
    return [block for block in RUN if block.document == document][-1]


def test_every_block_that_is_not_run_says_why() -> None:
    assert len(RUN) > len(BLOCKS) - len(RUN) > 0
    assert all(len(block.excuse.split()) >= 3 for block in BLOCKS if block.excuse is not None)
    assert not {page for page in PAGES if page not in {block.document for block in RUN}}, "pages that are run no more"


def test_the_page_on_data_shows_every_format() -> None:
    shown = "".join(block.text for block in RUN if block.document == "docs/your-own-data.md")
    formats = set(re.findall(r"\bdata=(\w+)", shown)) | set(re.findall(r"source: (\w+)", shown))
    assert formats == {path.stem for path in (ROOT / "conf" / "data").glob("*.yaml")}
