"""The least time that a step can take on given devices, and what bounds it: the roofline model.

Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785, with the network as a third roof. Every device is
taken to do an equal share of the work, at its peak; computing, reading memory and sending are taken to go on at the
same time, so that a step takes as long as the slowest of the three. What is computed element by element counts as the
memory that it reads and writes, which takes longer. Real steps take longer: `chips.Chip.efficiency` says how far
well-tuned training comes.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from flaxmodels.perf.chips import Chip
from flaxmodels.perf.collectives import TRANSFER
from flaxmodels.perf.compiled import Row
from flaxmodels.perf.count import Count

# For whoever prints an MFU: formulas differ.
FORMULA = (
    "MFU = FLOPs of the model's matrix products and convolutions, forward and backward, nothing computed twice, causal "
    "attention in full, / (seconds x devices x peak FLOP/s of their dtype)"
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Bounds of one step.

    Attributes:
      seconds: the least that it can take, the largest of the next three.
      compute: seconds of matrix products and convolutions at peak.
      memory: seconds to read and write memory.
      network: seconds of collectives.
      bound: what takes longest.
      mfu: model FLOPs utilization in `seconds`, see `FORMULA`; less than 1 even if compute bounds, where there is work
        that is not the model's.
      examples_per_second: of the global batch.
      tokens_per_second: None where examples are not tokens.
    """

    seconds: float
    compute: float
    memory: float
    network: float
    bound: Literal["compute", "memory", "network"]
    mfu: float
    examples_per_second: float
    tokens_per_second: float | None


def roofline(
    hardware: Count,
    model: Count,
    rows: Sequence[Row],
    chip: Chip,
    mesh: Mesh,
    examples: int,
    tokens: int | None = None,
) -> Roofline:
    """Bounds of one step.

    Args:
      hardware: all that a step computes and moves, of all devices.
      model: what of it is the model's, for the MFU.
      rows: its collectives, of one device.
      chip: what each device is.
      mesh: of the devices.
      examples: of a step.
      tokens: of a step; None for no tokens.
    """
    roofs: dict[Literal["compute", "memory", "network"], float] = {
        "compute": compute_seconds(hardware, chip, mesh.size),
        "memory": hardware.bytes / mesh.size / chip.bandwidth,
        "network": sum(network_seconds(row, chip, mesh) for row in rows),
    }
    bound = max(roofs, key=lambda name: roofs[name])
    seconds = roofs[bound]
    rate = 1 / seconds if seconds else math.inf
    used = compute_seconds(model, chip, mesh.size) * rate if seconds else 0.0
    return Roofline(seconds, **roofs, bound=bound, mfu=used, examples_per_second=examples * rate,
                    tokens_per_second=None if tokens is None else tokens * rate)  # fmt: skip


def compute_seconds(count: Count, chip: Chip, devices: int) -> float:
    """Seconds of all matrix products and convolutions, at peak, each in its dtype."""
    return sum(flops / chip.flops(dtype) for dtype, flops in count.flops.items()) / devices


def mfu(model: Count, seconds: float, chip: Chip, devices: int) -> float:
    """Model FLOPs utilization of a step that took so many seconds on so many devices; see `FORMULA`."""
    return compute_seconds(model, chip, devices) / seconds


def network_seconds(row: Row, chip: Chip, mesh: Mesh) -> float:
    """Seconds that a device sends in all runs of a collective.

    A ring of n devices sends (n - 1) / n of the buffer, and twice that for an all-reduce; a permutation sends it once;
    an all-to-all is counted as if a switch joined all. Of devices in several slices or nodes, each of these first
    gathers or reduces within, and then each device exchanges its part with its likes outside.

    A collective along one axis of a torus can use the links of the dimensions that the axis lies on, each in both
    directions, but in one only where they don't close to a ring.
    """
    if row.kind == TRANSFER:
        return row.bytes / chip.slow_link
    group = _group(mesh, row.axes)
    places = {_place(device) for device in group}
    outside, inside = len(places), len(group) / len(places)
    if row.kind in ("collective-permute", "collective-broadcast"):
        return row.bytes / (chip.slow_link if outside > 1 else _along(group, chip, mesh))
    times = 2 if row.kind == "all-reduce" else 1
    within = row.bytes * (inside - 1) / inside / _along(group, chip, mesh) if inside > 1 else 0.0
    between = row.bytes / inside * (outside - 1) / outside / chip.slow_link
    return times * (within + between)


def _group(mesh: Mesh, axes: Sequence[str]) -> list[jax.Device]:
    """The devices of one group along these axes; all of them where no axis is known."""
    names = axes or mesh.axis_names
    at = tuple(slice(None) if name in names else 0 for name in mesh.axis_names)
    return list(np.asarray(mesh.devices[at], dtype=object).reshape(-1))


def _place(device: Any) -> Any:
    """What a device is in, where the links end: a slice of TPUs, or a process of GPUs or CPUs, one for each node."""
    if device.platform == "tpu":
        return getattr(device, "slice_index", 0)
    return device.process_index


def _along(group: Sequence[Any], chip: Chip, mesh: Mesh) -> float:
    """Bytes/s that a device can send within its slice to others of its group."""
    if not chip.torus or any(getattr(device, "coords", None) is None for device in group):
        return chip.link
    own = [device.coords for device in group if _place(device) == _place(group[0])]
    every = [device.coords for device in mesh.devices.flat if _place(device) == _place(group[0])]
    links = 0
    for mine, sides in zip(zip(*own), zip(*every)):
        length = max(sides) - min(sides) + 1
        links += 0 if len(set(mine)) == 1 else 2 if length % chip.closes == 0 else 1
    return chip.link * (links or 2 * chip.torus) / (2 * chip.torus)
