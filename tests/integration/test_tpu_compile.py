"""The TPU's own compiler on our training step, without a TPU: it compiles, fits, has the fused kernel, and takes what was estimated."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from cluster.tpu.catalog import AcceleratorType, lookup
from launcher.check import ENVIRONMENT
from launcher.config import TrainingConfig
from launcher.estimate.memory import estimate_memory, fits
from launcher.estimate.run import ERROR
from launcher.estimate.step import StepShape, libtpu_topology
from launcher.models.registry import VARIANTS
from launcher.training.compile_check import Compilation
from tests.integration.conftest import ROOT
from tests.integration.tpu_compile_worker import CUT, NAME

SLICES = {"one slice": ("v6e-4", 1, {"fsdp": 4}), "two slices": ("v5litepod-4", 2, {"fsdp": 2, "tensor": 2})}
COMPILING_S = 280


def step_of(slices: int, kind: AcceleratorType, mesh: dict[str, int]) -> StepShape:
    trainer = {"batch_size": 8, "seq_len": 256, "compute_dtype": "bfloat16", "remat": "full", "mesh": {"data": 1, **mesh}}
    config = TrainingConfig.from_dict({"model": {"variant": NAME}, "data": {"source": "python_stdlib"}, "trainer": trainer})
    return StepShape(config, config.check_devices(kind.chips * slices, slices))


@pytest.fixture(scope="module")
def compiled() -> dict[str, tuple[StepShape, AcceleratorType, Compilation]]:
    """All in one process, which libtpu takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, NAME, CUT)
        steps = {name: (step_of(slices, lookup(kind), mesh), lookup(kind)) for name, (kind, slices, mesh) in SLICES.items()}
        requests = [
            {"config": step.config.to_dict(), "topology": libtpu_topology(kind), "slices": step.mesh.shape["slice"]}
            for step, kind in steps.values()
        ]
        command = [sys.executable, "-m", "tests.integration.tpu_compile_worker"]
        done = subprocess.run(
            command,
            input=json.dumps(requests),
            env=os.environ | ENVIRONMENT,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=COMPILING_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return {name: (*steps[name], Compilation(**answer)) for name, answer in zip(steps, answers, strict=True)}


@pytest.mark.parametrize("case", SLICES)
def test_the_step_compiles_and_fits_with_the_fused_kernel_and_takes_what_was_estimated(
    compiled: dict[str, tuple[StepShape, AcceleratorType, Compilation]], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VARIANTS, NAME, CUT)
    step, kind, found = compiled[case]
    print(case, found, estimate_memory(step))  # shown where it fails
    assert found.compiles, found.error
    assert found.fits
    assert found.total_bytes is not None
    assert fits(found.total_bytes, kind.hbm_gib)
    assert found.fused_attention
    assert found.collectives
    assert estimate_memory(step).total == pytest.approx(found.total_bytes, rel=ERROR)
