"""The cores that peers run on, and what else uses them meanwhile."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flaxmodels.registry import UserError

_STAT = Path("/proc/stat")
# Columns of it that are no work: idle, and waiting for a disk.
_IDLE = (3, 4)


def cores(count: int) -> tuple[int, ...]:
    """The last `count` cores that this process may use, since interrupts and others' work favour the first.

    Returns:
      Their numbers; () where this system can't pin a process.

    Raises:
      UserError: there are fewer.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ()
    there = sorted(os.sched_getaffinity(0))
    if count > len(there):
        raise UserError(f"--cores={count}: this process may use {len(there)}. Ask for so many, or fewer.")
    return tuple(there[-count:])


def others(numbers: Sequence[int]) -> Callable[[float], float | None]:
    """Start to watch cores.

    Args:
      numbers: of the cores; () for all.

    Returns:
      (processor seconds that were our own) -> the share of the cores' time since the start that others used, 0 to 1;
      None where the system does not tell.
    """
    begun, before = time.perf_counter(), _busy(numbers)

    def share(own: float) -> float | None:
        after, passed = _busy(numbers), time.perf_counter() - begun
        if before is None or after is None:
            return None
        count = len(numbers) or os.cpu_count() or 1
        return min(max((after - before - own) / (passed * count), 0.0), 1.0)

    return share


def _busy(numbers: Sequence[int]) -> float | None:
    """Processor seconds that were used so far, also those that a hypervisor gave to others."""
    if not _STAT.exists():
        return None
    ticks = 0
    for line in _STAT.read_text().splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdecimal() and (not numbers or int(name[3:]) in numbers):
            ticks += sum(int(field) for i, field in enumerate(fields[:8]) if i not in _IDLE)
    return ticks / os.sysconf("SC_CLK_TCK")
