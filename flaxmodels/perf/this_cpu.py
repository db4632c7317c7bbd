"""What the CPU at hand can do: measured once, since no data sheet says what XLA reaches on it, and kept."""

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxmodels import hardware

SIDE = 1024  # of the matrices
SIZE = 2**26  # bytes that each core copies: more than its share of any cache


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of all cores that this process may use.

    Attributes:
      machine: model, cores, version of JAX.
      date: when, "YYYY-MM-DD".
      peak: FLOP/s of matrix products by dtype, as in `chips.Chip`.
      bandwidth: bytes/s of copies, reads and writes together.
    """

    machine: str
    date: str
    peak: Mapping[str, float]
    bandwidth: float


def measured() -> Measured:
    """What was measured on this machine before, or is now, in about a second.

    It is kept in cpu.json in `hardware.cache_folder()`: to measure again, delete that.
    """
    machine = f"{_model()}, {len(os.sched_getaffinity(0))} cores, jax {jax.__version__}"
    path = hardware.cache_folder() / "cpu.json"
    kept = _read(path)
    if machine not in kept:
        kept[machine] = _measure(machine)
        _write(path, kept)
    return kept[machine]


def _model() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def _read(path: Path) -> dict[str, Measured]:
    """What was kept; nothing where the file is missing or is not what we write."""
    try:
        kept = {machine: Measured(**one) for machine, one in json.loads(path.read_text()).items()}
        return kept if all(one.bandwidth > 0 and min(one.peak.values()) > 0 for one in kept.values()) else {}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write(path: Path, kept: Mapping[str, Measured]) -> None:
    """Whole or not at all; where there is no such folder to be had, it is measured again next time."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        hardware.make_cache_folder()
        draft.write_text(json.dumps({machine: dataclasses.asdict(one) for machine, one in kept.items()}, indent=1))
        draft.replace(path)


def _measure(machine: str) -> Measured:
    """By processor time, which stands still while others have the cores: a busy machine is measured as a quiet one."""
    cores, peak = len(os.sched_getaffinity(0)), {}
    for dtype in ("float32", "bfloat16"):
        a = jax.device_put(jnp.ones((SIDE, SIDE), dtype), jax.local_devices(backend="cpu")[0])
        product = jax.jit(jnp.matmul).lower(a, a).compile()
        peak[dtype] = cores * 2 * SIDE**3 / _fastest(partial(_run, product, a), time.process_time)
    peak |= {f"float32 {level}": peak["float32"] for level in ("high", "highest")}
    with ThreadPoolExecutor(cores) as pool:  # all at once: the cores share one memory
        rates = [2 * SIZE / seconds for seconds in pool.map(_copy, range(cores))]
    return Measured(machine, datetime.date.today().isoformat(), peak, sum(rates))


def _run(product: jax.stages.Compiled, a: jax.Array) -> None:
    product(a, a).block_until_ready()


def _copy(_: int) -> float:
    source, target = np.ones(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
    return _fastest(lambda: np.copyto(target, source), time.thread_time)


def _fastest(work: Callable[[], Any], clock: Callable[[], float], times: int = 10) -> float:
    """Seconds of the fastest of several runs: whatever disturbs only adds."""
    taken = []
    for _ in range(times):
        started = clock()
        work()
        taken.append(clock() - started)
    return min(taken)
