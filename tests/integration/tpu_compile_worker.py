"""Compiles steps as `tpu train check` does, of a model that is no published one: a request in, its answer out, as JSON."""

import dataclasses
import json
import os
import sys

from launcher.models.registry import VARIANTS
from launcher.training.compile_check import compile_for

NAME = "gemma3-cut"
CUT = dataclasses.replace(
    VARIANTS["gemma3-270m"],
    layers=2,
    local_per_global=1,
    d_model=256,
    d_ff=2048,
    heads=2,
    head_dim=128,
    query_scale=128.0,
    window=128,
    summary="the whole vocabulary, and two narrow layers",
)
"""One layer with a window and one without, which is all that the compiler sees of any depth. Narrow, since it takes the longer the wider
they are; with the whole vocabulary, since a program of nothing but code would say little of the estimate.
"""


if __name__ == "__main__":
    VARIANTS[NAME] = CUT
    print(json.dumps(dataclasses.asdict(compile_for(**json.loads(sys.stdin.read())))), flush=True)
    os._exit(0)  # where the request was a quick one, the compiler is still at work
