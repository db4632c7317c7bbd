"""What a step that was timed achieves, held against what its devices can: FLOP/s, MFU, the roofline; and its memory."""

import contextlib
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from flaxmodels.job import Job
from flaxmodels.perf import chips, compiled, count, roofline
from flaxmodels.registry import UserError
from flaxmodels.runtime.exits import FaultError

_PROCESS = Path("/proc/self")


def achieved(job: Job, program: jax.stages.Compiled, seconds: float) -> dict[str, Any]:
    """What a step of a job achieves in so many seconds, ready for JSON.

    Returns:
      "examples_per_second", "tokens_per_second" (None where there are no tokens), "model_flops" of a step,
      "flops_per_second", "mfu" (see `roofline.FORMULA`), "chip" (whose peak that is), "roofline_ms",
      "roofline_fraction" and "bound" (of `roofline`), "compiled_bytes" (of one device at the most, as the compiler
      says), and "notes" on what is not known, which is None.
    """
    size, notes = job.train.batch_size, list[str]()
    tokens = size * job.source.tokens_per_example if job.source.tokens_per_example > 1 else None
    found: dict[str, Any] = {
        "examples_per_second": round(size / seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1) if tokens else None,
        **dict.fromkeys(("chip", "mfu", "roofline_ms", "roofline_fraction", "bound", "compiled_bytes")),
    }
    step = count.of_job(job)
    notes += step.hardware.notes
    flops = math.fsum(step.model.flops.values())
    found |= {"model_flops": flops, "flops_per_second": flops / seconds}
    try:
        report = compiled.report(program, job)
        found["compiled_bytes"] = report.memory.peak
        notes += report.notes
        chip = chips.of(job.mesh.devices.flat[0])
        best = roofline.roofline(step.hardware, step.model, report.collectives, chip, job.mesh, size, tokens)
        found |= {
            "chip": chip.name,
            "mfu": round(roofline.mfu(step.model, seconds, chip, job.mesh.size), 4),
            "roofline_ms": round(1e3 * best.seconds, 4),
            "roofline_fraction": round(best.seconds / seconds, 4),
            "bound": best.bound,
        }
    except (UserError, FaultError) as error:
        notes.append(f"MFU and roofline are not known: {error}")
    return {**found, "notes": notes}


def forget_peak() -> None:
    """Let the peak of this process's memory begin anew, where the system can."""
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")


def peak(devices: Sequence[jax.Device]) -> tuple[int, str]:
    """The most memory that was in use: (bytes, of what)."""
    stats: list[Mapping[str, Any]] = [device.memory_stats() or {} for device in devices]
    if all("peak_bytes_in_use" in found for found in stats):
        return max(int(found["peak_bytes_in_use"]) for found in stats), "of one device, since the process began"
    with contextlib.suppress(OSError, StopIteration):
        line = next(line for line in (_PROCESS / "status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024, "of this process, while it made steps"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "of this process, since it began"
