"""How long it takes until a program can run: traced, lowered, compiled, with JAX's cache of programs empty or full."""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

# What JAX calls the end of tracing, once for each function that is jitted inside another one, too.
_TRACED = "/jax/core/compile/jaxpr_trace_duration"


@dataclasses.dataclass(frozen=True)
class Seconds:
    """How long each part took.

    Attributes:
      trace: Python runs the function, once, with tracers.
      lower: its jaxpr becomes StableHLO.
      compile: XLA makes a program of that, or the cache of programs has it.
    """

    trace: float
    lower: float
    compile: float


def timed(lower: Callable[[], jax.stages.Lowered]) -> tuple[jax.stages.Compiled, Seconds]:
    """Trace, lower and compile.

    Args:
      lower: traces and lowers a program anew.
    """
    traced = [0.0]  # of the whole, which contains all others

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _TRACED:
            traced[0] = max(traced[0], duration_secs)

    monitoring.register_event_duration_secs_listener(listen)
    try:
        begun = time.perf_counter()
        lowered = lower()
        passed = time.perf_counter() - begun
    finally:
        monitoring.unregister_event_duration_listener(listen)
    begun = time.perf_counter()
    compiled = lowered.compile()
    return compiled, Seconds(traced[0], passed - traced[0], time.perf_counter() - begun)


@contextlib.contextmanager
def fresh_cache() -> Iterator[None]:
    """JAX's cache of programs is an empty folder inside, which goes afterwards, and keeps programs of any size."""
    keys = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")
    before = {key: getattr(jax.config, key) for key in keys}
    with tempfile.TemporaryDirectory(prefix="flaxmodels_programs_", ignore_cleanup_errors=True) as folder:
        for key, value in zip(keys, (folder, 0.0, True)):
            jax.config.update(key, value)
        compilation_cache.reset_cache()  # else JAX goes on with the folder that it began with
        try:
            yield
        finally:
            for key, value in before.items():
                jax.config.update(key, value)
            compilation_cache.reset_cache()
