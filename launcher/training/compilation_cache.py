"""JAX's persistent compilation cache, kept by every process: what a host has compiled once is there at the next attempt.

JAX writes entries from process 0 only, for a cache folder that all hosts share, and has no setting for another. Ours is a folder of each
host; and on CPU devices every process has keys of its own, so that only process 0 would ever find anything.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import wrapt

_COMPILER = "jax._src.compiler"  # JAX publishes no other name for it; the version is pinned
_WRITE = "_cache_write"


def keep_in(folder: str | Path) -> None:
    """Have JAX keep all that it compiles in `folder`. Where Python's packages and our code lie makes no difference to its keys: a fused
    kernel is handed to the compiler with the paths of its source files, and the key is made of that as well.
    """
    import jax

    ours = Path(__file__).parents[2]  # a checkout may have its environment in it: packages come first below
    settings: dict[str, Any] = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_persistent_cache_enable_xla_caches": "none",  # of XLA's own for GPUs, whose folder would be part of the key
        "jax_hlo_source_file_canonicalization_regex": f"^(.*/site-packages|{re.escape(str(ours))})/",
    }
    for name, value in settings.items():
        jax.config.update(name, value)  # type: ignore[no-untyped-call]


def keep_on_every_host() -> None:
    """Have all processes of a run write entries, as soon as JAX is imported."""
    wrapt.register_post_import_hook(_patch, _COMPILER)


def _patch(compiler: Any) -> None:
    if not isinstance(getattr(compiler, _WRITE), wrapt.FunctionWrapper):
        wrapt.wrap_function_wrapper(compiler, _WRITE, _writer(compiler))


def _writer(compiler: Any) -> Callable[[Callable[..., None], object, tuple[Any, ...], Mapping[str, Any]], None]:
    def write(jax_write: Callable[..., None], _instance: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if compiler.distributed.global_state.process_id == 0:
            jax_write(*args, **kwargs)
        else:
            _write(compiler, *args, **kwargs)

    return write


def _write(compiler: Any, key: str, seconds: float, name: str, backend: Any, executable: Any, host_callbacks: Any) -> None:
    """What JAX does in process 0: entries that call back into Python, or were quick to compile, are not kept."""
    if host_callbacks or seconds < compiler.config.persistent_cache_min_compile_time_secs.value:
        return
    try:
        compiler.compilation_cache.put_executable_and_time(key, name, executable, backend, int(seconds))
    except OSError as error:  # a full disk, say: the program is compiled all the same
        warnings.warn(f"{name} could not be kept in the compilation cache: {error}", stacklevel=1)
