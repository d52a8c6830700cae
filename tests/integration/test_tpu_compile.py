"""The TPU's own compiler on our training step, without a TPU: it compiles, fits, has the fused kernel, and takes what was estimated."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest

from cluster.tpu.catalog import AcceleratorType, lookup
from launcher.check import ENVIRONMENT
from launcher.config import TrainingConfig
from launcher.estimate.memory import estimate_memory, fits
from launcher.estimate.run import ERROR
from launcher.estimate.step import StepShape, libtpu_topology
from launcher.models.registry import VARIANTS
from launcher.programs import ENTRIES
from launcher.training.compile_check import Compilation
from tests.integration.conftest import ROOT
from tests.integration.tpu_compile_worker import CUT, NAME


@dataclass(frozen=True)
class Case:
    """`quick`: as far as every buffer has its place; the rest takes minutes."""

    kind: AcceleratorType
    slices: int
    mesh: dict[str, int]
    batch: tuple[int, int]
    quick: bool


CASES = {
    # Little but a table and a chunk of the loss, of which the compiler keeps some in a chip's vector memory: its bytes are not held
    "one slice": Case(lookup("v6e-4"), 1, {"fsdp": 4}, (8, 256), quick=False),
    # 8 x 2 of a slice of 4 x 4: an axis takes part of one of the slice's
    "split axes": Case(lookup("v6e-16"), 1, {"fsdp": 8, "tensor": 2}, (64, 1024), quick=True),
    # With so much of the table on each chip that its gradient has no place in the vector memory
    "two slices": Case(lookup("v5litepod-4"), 2, {"data": 2, "fsdp": 2}, (8, 256), quick=True),
}
COMPILING_S = 280


def step_of(case: Case) -> StepShape:
    rows, length = case.batch
    trainer = {"batch_size": rows, "seq_len": length, "compute_dtype": "bfloat16", "remat": "full", "mesh": {"data": 1, **case.mesh}}
    config = TrainingConfig.from_dict({"model": {"variant": NAME}, "data": {"source": "python_stdlib"}, "trainer": trainer})
    return StepShape(config, config.check_devices(case.kind.chips * case.slices, case.slices))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled programs go."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def compiled(kept: Path) -> dict[str, tuple[StepShape, Compilation]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, NAME, CUT)
        steps = {name: step_of(case) for name, case in CASES.items()}
        return {name: (steps[name], compilation(case, steps[name], kept / name)) for name, case in CASES.items()}


def compilation(case: Case, step: StepShape, keep: Path) -> Compilation:
    """Each in a process of its own: the compiler goes on with what a quick one has not waited for, and the next would have to."""
    request = {"config": step.config.to_dict(), "topology": libtpu_topology(case.kind), "slices": case.slices, "quick": case.quick}
    kept = {} if case.quick else {"keep": str(keep)}
    return Compilation(**json.loads(work("tpu_compile_worker", input=json.dumps(request | kept)).splitlines()[-1]))


def work(worker: str, *arguments: str, env: dict[str, str] | None = None, input: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.integration.{worker}", *arguments],
        input=input,
        env=os.environ | ENVIRONMENT | (env or {}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=COMPILING_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", CASES)
def test_the_step_compiles_and_fits_with_the_fused_kernel_and_takes_what_was_estimated(
    compiled: dict[str, tuple[StepShape, Compilation]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VARIANTS, NAME, CUT)
    case, (step, found) = CASES[name], compiled[name]
    print(name, found, estimate_memory(step))  # shown where it fails
    assert found.compiles is (None if case.quick else True), found.error
    assert found.fits
    assert found.total_bytes is not None
    assert fits(found.total_bytes, case.kind.hbm_gib)
    assert found.fused_attention
    assert found.collectives
    assert found.analysis_bytes is None or found.analysis_bytes >= found.total_bytes
    if case.quick:  # there is no code yet
        estimate = estimate_memory(step)
        assert estimate.total - estimate.program == pytest.approx(found.total_bytes, rel=ERROR)


def test_what_was_compiled_to_its_end_is_kept_as_an_entry_of_jaxs_cache(
    compiled: dict[str, tuple[StepShape, Compilation]], kept: Path
) -> None:
    steps = list(kept.rglob(ENTRIES))
    assert [path.parent.name for path in steps] == [name for name, case in CASES.items() if not case.quick]
    assert steps[0].stat().st_size > 100_000, "with its machine code"


def test_an_entrys_name_is_the_same_wherever_the_packages_lie_and_whatever_the_compiler_dumps(tmp_path: Path) -> None:
    """Or no other machine would ever find it; and the kernel is handed to the compiler with the paths of its source."""
    elsewhere = tmp_path / "site-packages"
    elsewhere.mkdir()
    (elsewhere / "jax").symlink_to(Path(str(jax.__file__)).parent)
    work("tpu_kernel_worker", str(tmp_path / "here"), str(tmp_path / "dump"))
    work("tpu_kernel_worker", str(tmp_path / "there"), env={"PYTHONPATH": str(elsewhere)})
    here, there = ({path.name for path in (tmp_path / place).glob("jit_attend-*")} for place in ("here", "there"))
    assert len(here) == 1
    assert here == there
