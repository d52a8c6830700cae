"""What a run makes of a process that was warm before it, with the real libraries; the nursery's part is in tests/unit/test_nursery.py."""

import json
import os
import sys
from pathlib import Path

import pytest

from launcher import code
from launcher.gang.pipes import start
from tests.integration.conftest import ROOT
from tests.script_run import make_script_run

pytestmark = pytest.mark.timeout(300)

PROGRAM = """
import json, os, sys
already = "jax" in sys.modules
import jax
from jax._src import xla_bridge
from launcher.training import script
told = {"already": already, "devices": jax.device_count(), "async": xla_bridge._CPU_ENABLE_ASYNC_DISPATCH.value,
        "cache": jax.config.jax_compilation_cache_dir, "x64": jax.config.jax_enable_x64, "code": script.__file__,
        "by_jax": os.getenv("TPU_SKIP_MDS_QUERY")}
print(json.dumps(told), flush=True)
"""


@pytest.mark.parametrize(
    ("program", "own", "already"),
    [
        pytest.param(PROGRAM, {}, True, id="is the run's process"),
        pytest.param(PROGRAM, {"JAX_ENABLE_X64": "1"}, False, id="other settings of JAX: a new Python"),
        pytest.param("import os\nos.environ['A'] = 'b'\n" + PROGRAM, {}, False, id="a program that sets its environment: a new Python"),
    ],
)
def test_a_warm_process_becomes_that_of_a_run(tmp_path: Path, program: str, own: dict[str, str], already: bool) -> None:
    run = make_script_run(tmp_path, program)
    unpacked = code.unpack(run.read_code(), tmp_path / "unpacked")
    host = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=3", "PYTHONSAFEPATH": "1"}
    host["PYTHONPATH"] = str(ROOT)
    output = os.open(tmp_path / "before", os.O_WRONLY | os.O_CREAT)
    process, pipes = start([sys.executable, "-m", "launcher.training.warm"], host, output, spare=True)
    os.close(output)
    environment = host | {
        "PYTHONPATH": str(unpacked / "podlaunch"),
        "PODLAUNCH_USER_CODE": str(unpacked / "user"),
        "PODLAUNCH_COMPILATION_CACHE": str(tmp_path / "cache"),
        "PODLAUNCH_RUN_DIR": str(run.path),
        "PODLAUNCH_PROCESS_ID": "0",
        "JAX_PROCESS_ID": "0",
        **own,
    }
    log = tmp_path / "log"
    orders = {"arguments": [str(run.path), "--attempt", "0"], "environment": environment, "log": str(log)}
    assert pipes.orders is not None
    os.write(pipes.orders, (json.dumps(orders) + "\n").encode())
    try:
        assert process.wait(200) == 0, (tmp_path / "before").read_text()
    finally:
        process.kill()
        process.wait()
        pipes.close()
    told = json.loads(log.read_text().splitlines()[-1])
    # JAX sets variables for libtpu when it is imported; on a machine without TPU chips that one.
    expected = {"by_jax": "1", "already": already, "devices": 3, "async": False, "cache": str(tmp_path / "cache"), "x64": bool(own)}
    assert told == {**expected, "code": str(unpacked / "podlaunch" / "launcher" / "training" / "script.py")}
