"""`tpu train check`: what the TPU's own compiler says of a run's training step, and the estimates beside it, before a TPU is paid for."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError, PodlaunchError
from launcher import programs
from launcher.config import LaunchConfig
from launcher.estimate.run import Estimate, estimate_of
from launcher.estimate.step import libtpu_topology
from launcher.training.compile_check import Compilation

LIBTPU = "libtpu"
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # the compiler is asked for by name; nothing looks for a TPU
    "TPU_SKIP_MDS_QUERY": "1",  # nor for the metadata server of a TPU VM
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is opened, so several may compile at a time
}
_NOT_FOR_THE_CHILD = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_COMPILATION_CACHE_DIR")


@dataclass(frozen=True)
class Check:
    """What was found out about a run's training step."""

    config: LaunchConfig
    estimate: Estimate
    compilation: Compilation

    @property
    def good(self) -> bool:
        """Whether nothing was found that speaks against it."""
        return self.compilation.compiles is not False and self.compilation.fits is True

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it. Bytes and FLOPs are of one chip."""
        slices, kind, time = self.config.slices, self.config.slices.accelerator, self.estimate.time
        trainer = self.config.training_on_slices.trainer
        return {
            "model": self.config.training_on_slices.model.variant,
            "accelerator_type": kind.name,
            "topology": kind.topology,
            "slices": slices.slices,
            "chips": slices.chips,
            "mesh": trainer.mesh.shape,
            "batch_size": trainer.batch_size,
            "seq_len": trainer.seq_len,
            "remat": self.config.training_on_slices.remat,
            "good": self.good,
            "hbm_bytes": kind.hbm_gib * 2**30,
            "compiler": asdict(self.compilation),
            "estimated": {
                "fits": self.estimate.fits,
                "bytes": self.estimate.memory.by_kind() | {"total": self.estimate.memory.total},
                "model_flops": time.model_flops,
                "hardware_flops": time.hardware_flops,
                "hbm_bytes_moved": time.hbm_bytes,
                "ici_bytes_received": time.ici_bytes,
                "dcn_bytes_received": time.dcn_bytes,
                "step_seconds_at_least": time.step_s,
                "bound_by": time.bound,
                "tokens_per_second_at_most": time.tokens_per_second,
                "mfu_at_most": time.mfu,
                "usd_per_billion_tokens_at_least": time.usd_per_billion_tokens,
            },
        }


def check(config: LaunchConfig, limit_s: float | None = None, *, quick: bool = False) -> Check:
    """Compile the training step of `config` for its slices; takes minutes for a large model, and seconds when `quick`: only as far as every
    buffer has its place.

    Raises ConfigError where there is nothing to compile or nothing to compile with, PodlaunchError when the compiler itself breaks down
    or takes longer than `limit_s`.
    """
    if config.is_script:
        raise ConfigError("tpu train check compiles our training step; job=script runs your own program, of which we know nothing")
    if importlib.util.find_spec(LIBTPU) is None:
        raise ConfigError('tpu train check needs the TPU compiler, which is not installed: pip install -c requirements.lock -e ".[tpu]"')
    if quick:
        return Check(config, estimate_of(config), _compile(config, limit_s))
    with programs.room_for(config) as folder:
        return Check(config, estimate_of(config), _compile(config, limit_s, folder))


def _compile(config: LaunchConfig, limit_s: float | None, keep: Path | None = None) -> Compilation:
    """In a process of its own: libtpu reads the environment once, and aborts its process where something is wrong with it. `keep`: where
    the program goes; without it, it is a quick one, of which there is none.
    """
    slices = config.slices
    topology = libtpu_topology(slices.accelerator)
    request = {
        "config": config.training_on_slices.to_dict(),
        "topology": topology,
        "slices": slices.slices,
        "quick": keep is None,
        "keep": None if keep is None else str(keep),
    }
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_THE_CHILD} | ENVIRONMENT
    command = [sys.executable, "-m", "launcher.training.compile_check"]
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, env=environment, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise PodlaunchError(f"the compiler has not come to an end within {limit_s:.0f} s") from error
    if done.returncode == 0:
        return Compilation(**json.loads(done.stdout))
    why = f"signal {-done.returncode}" if done.returncode < 0 else (done.stderr.strip().splitlines() or ["no word"])[-1]
    raise PodlaunchError(f"the compiler for {topology} broke down: {why}")
