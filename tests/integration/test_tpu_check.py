"""`tpu train check` with the TPU's real compiler: the step compiles for slices that are not there, fits, and is estimated well."""

import importlib.util
import json

import pytest

from launcher.estimate.run import ERROR
from tests.integration.conftest import Home

MODEL = ("model.variant=gemma3-270m", "experiment=bf16")
CASES = {
    "v6e": ("cluster=v6e", "cluster.accelerator_type=v6e-8"),
    "v5e, two slices": ("cluster=v5e", "cluster.accelerator_type=v5litepod-4", "cluster.slices=2", "cluster.max_slices=2"),
}
COMPILING_S = 1500
"""Of one step: about two minutes of one processor, which a busy machine does not have."""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="there is no libtpu for this platform")
@pytest.mark.timeout(COMPILING_S + 60)
@pytest.mark.parametrize("case", CASES)
def test_the_step_compiles_and_fits_with_the_fused_kernel_and_takes_what_was_estimated(alone: Home, case: str) -> None:
    done = alone.tpu("train", "check", *MODEL, *CASES[case], "--json", limit=COMPILING_S)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    compiler, estimated = found["compiler"], found["estimated"]
    print(json.dumps({"case": case, **found}))
    assert compiler["compiles"]
    assert compiler["fits"]
    assert compiler["fused_attention"]
    assert compiler["total_bytes"] == pytest.approx(estimated["bytes"]["total"], rel=ERROR)
    assert compiler["total_bytes"] < found["hbm_bytes"]
    assert compiler["collectives"]


def test_a_step_that_fits_no_mesh_is_refused_before_it_is_compiled(alone: Home) -> None:
    done = alone.tpu("train", "check", "model.variant=gemma3-12b", "experiment=bf16", "cluster=v5e", "cluster.accelerator_type=v5litepod-1")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "would fit: " in done.stderr
