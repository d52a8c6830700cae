"""Every shell block of docs/your-own-data.md, run in its order in one empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.runs import RunDirectory, RunState

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "your-own-data.md"
BLOCKS = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs_as_it_stands(folder: Path, number: int) -> None:
    (folder / "work").mkdir(exist_ok=True)
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PODLAUNCH_CACHE_DIR": str(folder / "cache"),
        "PODLAUNCH_STATE_DIR": str(folder / "state"),
        "JAX_PLATFORMS": "cpu",
        "NO_COLOR": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", BLOCKS[number]],
        cwd=folder / "work",
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, f"{BLOCKS[number]}\n{done.stdout}{done.stderr}"
    for name in re.findall(r"run\.name=(\S+)", BLOCKS[number]):
        status = RunDirectory(folder / "work" / "runs" / name).status()
        assert status is not None
        assert status.state is RunState.SUCCEEDED
        assert status.held_out_after is not None
        assert "held-out loss after training" in done.stdout
    if "samples.prompts" in BLOCKS[number]:
        assert "  after     " in done.stdout


def test_the_page_shows_every_format() -> None:
    shown = set(re.findall(r"\bdata=(\w+)", "".join(BLOCKS))) | set(re.findall(r"source: (\w+)", "".join(BLOCKS)))
    assert shown == {path.stem for path in (ROOT / "conf" / "data").glob("*.yaml")}
